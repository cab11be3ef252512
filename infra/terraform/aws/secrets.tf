# What pods need to know, read by External Secrets. Passwords are made while Terraform runs and written past its state
# (ephemeral, write-only): whoever reads the state learns none.

locals {
  databases = toset(["registry", "mlflow", "prefect", "serving"])
}

resource "aws_secretsmanager_secret" "database" {
  for_each = local.databases

  name        = "${var.name}/${each.key}-database"
  description = "Owner of the database ${each.key}"
  kms_key_id  = aws_kms_key.data.arn
  tags        = var.tags
}

ephemeral "aws_secretsmanager_random_password" "database" {
  for_each = local.databases

  password_length     = 40
  exclude_punctuation = true
}

resource "aws_secretsmanager_secret_version" "database" {
  for_each = local.databases

  secret_id                = aws_secretsmanager_secret.database[each.key].id
  secret_string_wo_version = 1 # a higher number writes a new password

  secret_string_wo = jsonencode({
    engine   = "postgres"
    host     = aws_db_instance.this.address
    port     = aws_db_instance.this.port
    dbname   = each.key
    username = each.key
    password = ephemeral.aws_secretsmanager_random_password.database[each.key].random_password
  })
}

locals {
  # What else is made once, by secret: each key of its JSON.
  made = {
    mlflow  = { description = "MLflow's administrator and the key of its sessions", keys = ["admin-password", "flask-secret-key"] }
    prefect = { description = "Account of the Prefect server", keys = ["auth-string"] }
  }
  made_keys = merge([for secret, is in local.made : { for key in is.keys : "${secret}/${key}" => key }]...)
}

resource "aws_secretsmanager_secret" "made" {
  for_each = local.made

  name        = "${var.name}/${each.key}"
  description = each.value.description
  kms_key_id  = aws_kms_key.data.arn
  tags        = var.tags
}

ephemeral "aws_secretsmanager_random_password" "made" {
  for_each = local.made_keys

  password_length     = 40
  exclude_punctuation = true
}

resource "aws_secretsmanager_secret_version" "made" {
  for_each = local.made

  secret_id                = aws_secretsmanager_secret.made[each.key].id
  secret_string_wo_version = 1

  secret_string_wo = jsonencode({
    for key in each.value.keys : key => join("", [
      key == "auth-string" ? "admin:" : "",
      ephemeral.aws_secretsmanager_random_password.made["${each.key}/${key}"].random_password,
    ])
  })
}

# Its content is written by hand: `serving keys` makes the accounts (keys.json).
resource "aws_secretsmanager_secret" "serving" {
  name        = "${var.name}/serving"
  description = "Accounts of the serving API (keys.json) and the token by which it is monitored (monitoring-token)"
  kms_key_id  = aws_kms_key.data.arn
  tags        = var.tags
}
