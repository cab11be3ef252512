output "adapters_bucket" {
  description = "The registry's bucket."
  value       = local.buckets.adapters
}

output "mlflow_bucket" {
  description = "MLflow's artifacts."
  value       = local.buckets.mlflow
}

output "backups_bucket" {
  description = "Where backups go."
  value       = local.buckets.backups
}

output "region" {
  description = "For AWS_REGION."
  value       = var.region
}

output "store" {
  description = "For ADAPTER_FOUNDRY_STORE."
  value       = "s3://${local.buckets.adapters}/${var.store_prefix}"
}

output "database_endpoint" {
  description = "Host of PostgreSQL."
  value       = aws_db_instance.this.address
}

output "database_master_secret_arn" {
  description = "Secret of the database's administrator, which RDS rotates."
  value       = aws_db_instance.this.master_user_secret[0].secret_arn
}

output "database_secret_names" {
  description = "Secrets of the databases' owners."
  value       = { for name, secret in aws_secretsmanager_secret.database : name => secret.name }
}

output "serving_role_arn" {
  description = "For the service account serving."
  value       = aws_iam_role.this["serving"].arn
}

output "publisher_role_arn" {
  description = "For the service account worker, and for workflows that publish."
  value       = aws_iam_role.this["publisher"].arn
}

output "maintenance_role_arn" {
  description = "For the service account maintenance."
  value       = aws_iam_role.this["maintenance"].arn
}

output "backup_role_arn" {
  description = "For the service account backup."
  value       = aws_iam_role.this["backup"].arn
}

output "mlflow_role_arn" {
  description = "For the service account mlflow."
  value       = aws_iam_role.this["mlflow"].arn
}

output "external_secrets_role_arn" {
  description = "For the service account external-secrets."
  value       = aws_iam_role.this["external-secrets"].arn
}

output "approver_role_arn" {
  description = "For people who approve: role_arn of a profile in ~/.aws/config."
  value       = aws_iam_role.this["approver"].arn
}

output "owner_role_arn" {
  description = "For people who change keys."
  value       = aws_iam_role.this["owner"].arn
}

output "signing_keys" {
  description = "URIs of the signing keys, for [registry.keys] and `registry trust add`."
  value       = { for role, key in aws_kms_key.signing : role => "awskms:${key.arn}" }
}
