# A platform in one account. Copy it, change the capital letters, and keep the state where several people reach it.

terraform {
  required_version = ">= 1.11"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.90, < 7"
    }
  }

  # backend "s3" {
  #   bucket       = "ACME-terraform"
  #   key          = "adapter-foundry.tfstate"
  #   region       = "eu-central-1"
  #   encrypt      = true
  #   use_lockfile = true
  # }
}

provider "aws" {
  region              = "eu-central-1"
  allowed_account_ids = ["111122223333"]

  default_tags {
    tags = { system = "adapter-foundry" }
  }
}

module "adapter_foundry" {
  source = "../aws"

  account_id    = "111122223333"
  region        = "eu-central-1"
  bucket_prefix = "acme-adapter-foundry"

  vpc_id                             = "vpc-0123456789abcdef0"
  database_subnet_ids                = ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"]
  database_client_security_group_ids = { nodes = "sg-0123456789abcdef0" }

  oidc_provider_arn        = "arn:aws:iam::111122223333:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE"
  github_oidc_provider_arn = "arn:aws:iam::111122223333:oidc-provider/token.actions.githubusercontent.com"
  github_subjects          = ["repo:acme/adapters:environment:publish"]

  approver_arns = ["arn:aws:iam::111122223333:role/people/approvers"]
  owner_arns    = ["arn:aws:iam::111122223333:role/people/registry-owners"]
}

output "platform" {
  description = "What the Kubernetes overlay prod and the publishing workflow are told."
  value       = module.adapter_foundry
}
