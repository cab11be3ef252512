variable "name" {
  description = "Beginning of every name that is made here. Secrets are <name>/…, the Kubernetes overlay expects adapter-foundry."
  type        = string
  default     = "adapter-foundry"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,24}[a-z0-9]$", var.name))
    error_message = "Use 3 to 26 lower-case letters, digits and hyphens, beginning with a letter."
  }
}

variable "account_id" {
  description = "The AWS account; written out, so that a plan for another account fails."
  type        = string

  validation {
    condition     = can(regex("^[0-9]{12}$", var.account_id))
    error_message = "An account id has twelve digits."
  }
}

variable "region" {
  description = "The region of everything, which is also that of the provider."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "Write the region like eu-central-1."
  }
}

variable "partition" {
  description = "aws, or aws-cn, aws-us-gov."
  type        = string
  default     = "aws"

  validation {
    condition     = contains(["aws", "aws-cn", "aws-us-gov"], var.partition)
    error_message = "There are the partitions aws, aws-cn and aws-us-gov."
  }
}

variable "tags" {
  description = "Tags of everything that takes tags."
  type        = map(string)
  default     = {}
}

# -- objects --

variable "bucket_prefix" {
  description = "Beginning of the three buckets' names (<prefix>-adapters, -mlflow, -backups), which are unique in the world."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,51}$", var.bucket_prefix))
    error_message = "Use 2 to 52 lower-case letters, digits and hyphens; dots break certificates."
  }
}

variable "store_prefix" {
  description = "Folder of the registry in its bucket: the store is s3://<bucket>/<store_prefix>."
  type        = string
  default     = "registry"

  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9._-]*$", var.store_prefix))
    error_message = "Use one plain folder name."
  }
}

variable "old_version_days" {
  description = "Days for which S3 keeps what was deleted or replaced: as long, a mistake of `registry gc` can be undone."
  type        = number
  default     = 90

  validation {
    condition     = var.old_version_days >= 7
    error_message = "Keep old versions for a week at least."
  }
}

variable "backup_lock_days" {
  description = "Days for which nobody can remove a backup (Object Lock, governance mode)."
  type        = number
  default     = 35

  validation {
    condition     = var.backup_lock_days >= 1 && var.backup_lock_days <= 3650
    error_message = "Between 1 and 3650 days."
  }
}

variable "access_log_bucket" {
  description = "Bucket that takes S3's access logs, or null. It has to allow logging.s3.amazonaws.com to write."
  type        = string
  default     = null
}

# -- database --

variable "vpc_id" {
  description = "The network of the database."
  type        = string
}

variable "database_subnet_ids" {
  description = "Private subnets in at least two zones."
  type        = list(string)

  validation {
    condition     = length(var.database_subnet_ids) >= 2
    error_message = "A subnet group needs subnets in two zones."
  }
}

variable "database_client_security_group_ids" {
  description = "Security groups that reach PostgreSQL, by a name of your own: the Kubernetes nodes' or pods'."
  type        = map(string)

  validation {
    condition     = length(var.database_client_security_group_ids) > 0
    error_message = "Nobody could reach the database."
  }
}

variable "database_version" {
  description = "Major version of PostgreSQL."
  type        = number
  default     = 17

  validation {
    condition     = var.database_version >= 15 && floor(var.database_version) == var.database_version
    error_message = "Use PostgreSQL 15 or later, the major version only."
  }
}

variable "database_instance_class" {
  description = "Size of the database."
  type        = string
  default     = "db.t4g.medium"
}

variable "database_storage_gb" {
  description = "Storage at the start, GB; it grows by itself to four times as much."
  type        = number
  default     = 50

  validation {
    condition     = var.database_storage_gb >= 20 && var.database_storage_gb <= 16384
    error_message = "Between 20 and 16384 GB."
  }
}

variable "database_multi_az" {
  description = "A second database in another zone that takes over; twice the price."
  type        = bool
  default     = true
}

variable "database_backup_days" {
  description = "Days to whose every second the database can be brought back (point-in-time recovery)."
  type        = number
  default     = 14

  validation {
    condition     = var.database_backup_days >= 1 && var.database_backup_days <= 35
    error_message = "RDS keeps 1 to 35 days; 0 would switch backups off."
  }
}

variable "database_deletion_protection" {
  description = "Whether the database refuses to be destroyed."
  type        = bool
  default     = true
}

# -- who may act as which role --

variable "oidc_provider_arn" {
  description = "IAM OIDC provider of the Kubernetes cluster (EKS), or null: then no pod takes a role."
  type        = string
  default     = null

  validation {
    condition     = var.oidc_provider_arn == null || can(regex("^arn:[a-z-]+:iam::[0-9]{12}:oidc-provider/.+", var.oidc_provider_arn))
    error_message = "Give the ARN of an IAM OIDC provider."
  }
}

variable "namespace" {
  description = "Kubernetes namespace of the platform."
  type        = string
  default     = "adapter-foundry"
}

variable "github_oidc_provider_arn" {
  description = "IAM OIDC provider of token.actions.githubusercontent.com, or null: then no workflow publishes."
  type        = string
  default     = null

  validation {
    condition     = var.github_oidc_provider_arn == null || can(regex(":oidc-provider/token\\.actions\\.githubusercontent\\.com$", var.github_oidc_provider_arn))
    error_message = "Give the ARN of the IAM OIDC provider of token.actions.githubusercontent.com."
  }
}

variable "github_subjects" {
  description = "Exact subjects of workflows that publish, such as repo:acme/adapters:environment:publish."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for subject in var.github_subjects : can(regex("^repo:[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+:(environment|ref):[A-Za-z0-9_./-]+$", subject))])
    error_message = "Name owner, repository and an environment or ref without wildcards: whoever matches can publish."
  }
}

variable "approver_arns" {
  description = "People (or their single-sign-on roles) who approve and promote."
  type        = list(string)
  default     = []
}

variable "owner_arns" {
  description = "People who change which keys are trusted, with a root key that they keep offline."
  type        = list(string)
  default     = []
}

variable "require_mfa" {
  description = "Whether people need a second factor in the session that takes a role. Single sign-on asks for it itself and does not say so: then false."
  type        = bool
  default     = true
}
