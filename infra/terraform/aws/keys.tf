# One key encrypts what lies in S3, RDS and Secrets Manager. One key for each role signs, and never leaves KMS; the root's
# keys are not here, they are offline (docs/keys.md).

locals {
  # Whose signature is made by whom. Nobody else in the account can sign, its administrators included.
  signers = {
    publisher = ["publisher", "owner"]
    scanner   = ["publisher"]
    evaluator = ["publisher"]
    approver  = ["approver", "owner"]
    online    = ["publisher", "approver", "owner", "maintenance"]
  }
  account_root = "arn:${var.partition}:iam::${var.account_id}:root"
}

resource "aws_kms_key" "data" {
  description             = "${var.name}: objects, databases and secrets"
  enable_key_rotation     = true
  deletion_window_in_days = 30
  tags                    = var.tags

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_kms_alias" "data" {
  name          = "alias/${var.name}-data"
  target_key_id = aws_kms_key.data.key_id
}

data "aws_iam_policy_document" "signing" {
  for_each = local.signers

  statement {
    sid       = "PoliciesOfTheAccountDecide"
    actions   = ["kms:*"]
    resources = ["*"]

    principals {
      type        = "AWS"
      identifiers = [local.account_root]
    }
  }

  statement {
    sid       = "OnlyItsRolesSign"
    effect    = "Deny"
    actions   = ["kms:Sign"]
    resources = ["*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "ArnNotEquals"
      variable = "aws:PrincipalArn"
      values   = [for role in each.value : local.role_arns[role]]
    }
  }
}

# Rotation of a signing key is a new key under its own name, listed by the owner; KMS does not rotate these itself.
resource "aws_kms_key" "signing" {
  for_each = local.signers

  description              = "${var.name}: signatures of the ${each.key} role"
  key_usage                = "SIGN_VERIFY"
  customer_master_key_spec = "ECC_NIST_P256"
  deletion_window_in_days  = 30
  policy                   = data.aws_iam_policy_document.signing[each.key].json
  tags                     = var.tags

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_kms_alias" "signing" {
  for_each = local.signers

  name          = "alias/${var.name}-${each.key}"
  target_key_id = aws_kms_key.signing[each.key].key_id
}
