# Roles: who may take them (trust), and what they may do (policies/*.json, which the tests hold against the requests that
# the registry's commands really send).

locals {
  roles = {
    serving          = { does = ["read"], service_account = "serving" }
    publisher        = { does = ["read", "publish"], service_account = "worker" }
    approver         = { does = ["read", "approve"], service_account = null }
    owner            = { does = ["read", "own"], service_account = null }
    maintenance      = { does = ["read", "maintain"], service_account = "maintenance" }
    backup           = { does = ["read", "backup"], service_account = "backup" }
    mlflow           = { does = ["mlflow"], service_account = "mlflow" }
    external-secrets = { does = ["secrets"], service_account = "external-secrets" }
  }
  role_arns = { for role in keys(local.roles) : role => "arn:${var.partition}:iam::${var.account_id}:role/${var.name}-${role}" }

  people = {
    approver = var.approver_arns
    owner    = var.owner_arns
  }
  issuer = var.oidc_provider_arn == null ? "" : split("oidc-provider/", var.oidc_provider_arn)[1]

  pods      = { for role, is in local.roles : role => is.service_account if var.oidc_provider_arn != null && is.service_account != null }
  workflows = var.github_oidc_provider_arn != null && length(var.github_subjects) > 0 ? { publisher = var.github_subjects } : {}

  policy_facts = {
    bucket        = local.bucket_arns.adapters
    objects       = local.objects_arn
    mlflow        = local.bucket_arns.mlflow
    backups       = local.bucket_arns.backups
    region        = var.region
    secrets       = "arn:${var.partition}:secretsmanager:${var.region}:${var.account_id}:secret:${var.name}/*"
    master_secret = aws_db_instance.this.master_user_secret[0].secret_arn
    data_key      = aws_kms_key.data.arn
    publisher_key = aws_kms_key.signing["publisher"].arn
    scanner_key   = aws_kms_key.signing["scanner"].arn
    evaluator_key = aws_kms_key.signing["evaluator"].arn
    approver_key  = aws_kms_key.signing["approver"].arn
    online_key    = aws_kms_key.signing["online"].arn
  }
}

data "aws_iam_policy_document" "trust" {
  for_each = local.roles

  # IAM wants a statement also for a role that nobody was given; this one lets nobody in.
  statement {
    sid     = "NobodyElse"
    effect  = "Deny"
    actions = ["sts:AssumeRole"]

    principals {
      type        = "AWS"
      identifiers = ["*"]
    }

    condition {
      test     = "StringNotEquals"
      variable = "aws:PrincipalAccount"
      values   = distinct(concat([var.account_id], [for arn in lookup(local.people, each.key, []) : split(":", arn)[4]]))
    }
  }

  dynamic "statement" {
    for_each = contains(keys(local.pods), each.key) ? [local.pods[each.key]] : []

    content {
      sid     = "Pods"
      actions = ["sts:AssumeRoleWithWebIdentity"]

      principals {
        type        = "Federated"
        identifiers = [var.oidc_provider_arn]
      }

      condition {
        test     = "StringEquals"
        variable = "${local.issuer}:sub"
        values   = ["system:serviceaccount:${var.namespace}:${statement.value}"]
      }

      condition {
        test     = "StringEquals"
        variable = "${local.issuer}:aud"
        values   = ["sts.amazonaws.com"]
      }
    }
  }

  dynamic "statement" {
    for_each = contains(keys(local.workflows), each.key) ? [local.workflows[each.key]] : []

    content {
      sid     = "Workflows"
      actions = ["sts:AssumeRoleWithWebIdentity"]

      principals {
        type        = "Federated"
        identifiers = [var.github_oidc_provider_arn]
      }

      condition {
        test     = "StringEquals"
        variable = "token.actions.githubusercontent.com:sub"
        values   = statement.value
      }

      condition {
        test     = "StringEquals"
        variable = "token.actions.githubusercontent.com:aud"
        values   = ["sts.amazonaws.com"]
      }
    }
  }

  dynamic "statement" {
    for_each = length(lookup(local.people, each.key, [])) > 0 ? [local.people[each.key]] : []

    content {
      sid     = "People"
      actions = ["sts:AssumeRole"]

      principals {
        type        = "AWS"
        identifiers = statement.value
      }

      dynamic "condition" {
        for_each = var.require_mfa ? ["true"] : []

        content {
          test     = "Bool"
          variable = "aws:MultiFactorAuthPresent"
          values   = [condition.value]
        }
      }
    }
  }
}

resource "aws_iam_role" "this" {
  for_each = local.roles

  name                 = "${var.name}-${each.key}"
  description          = "adapter-foundry: ${join(", ", each.value.does)}"
  assume_role_policy   = data.aws_iam_policy_document.trust[each.key].json
  max_session_duration = 3600
  tags                 = var.tags
}

resource "aws_iam_role_policy" "this" {
  for_each = merge([for role, is in local.roles : { for what in is.does : "${role}/${what}" => { role = role, what = what } }]...)

  name   = each.value.what
  role   = aws_iam_role.this[each.value.role].name
  policy = templatefile("${path.module}/policies/${each.value.what}.json", local.policy_facts)
}
