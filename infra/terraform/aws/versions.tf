terraform {
  required_version = ">= 1.11" # write-only arguments: passwords that no state file holds

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.90, < 7"
    }
  }
}
