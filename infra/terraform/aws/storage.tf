# The registry's objects, MLflow's artifacts and backups: a bucket each.

locals {
  buckets = {
    adapters = "${var.bucket_prefix}-adapters"
    mlflow   = "${var.bucket_prefix}-mlflow"
    backups  = "${var.bucket_prefix}-backups"
  }
  bucket_arns = { for kind, name in local.buckets : kind => "arn:${var.partition}:s3:::${name}" }
  objects_arn = "${local.bucket_arns.adapters}/${var.store_prefix}"
}

resource "aws_s3_bucket" "this" {
  for_each = local.buckets

  bucket              = each.value
  object_lock_enabled = each.key == "backups"
  tags                = var.tags

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_s3_bucket_ownership_controls" "this" {
  for_each = aws_s3_bucket.this

  bucket = each.value.id

  rule {
    object_ownership = "BucketOwnerEnforced" # no access lists
  }
}

resource "aws_s3_bucket_public_access_block" "this" {
  for_each = aws_s3_bucket.this

  bucket                  = each.value.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_versioning" "this" {
  for_each = aws_s3_bucket.this

  bucket = each.value.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  for_each = aws_s3_bucket.this

  bucket = each.value.id

  rule {
    bucket_key_enabled = true # one call to KMS for many objects

    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = aws_kms_key.data.arn
    }
  }
}

# `registry gc` and the removal of superseded metadata only put a marker over an object; its bytes go here, later.
# What was never deleted or replaced has no old version, so that nothing that a signed name means ever expires.
resource "aws_s3_bucket_lifecycle_configuration" "this" {
  for_each = aws_s3_bucket_versioning.this

  bucket = each.value.bucket

  rule {
    id     = "old-versions"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = each.key == "backups" ? max(var.old_version_days, var.backup_lock_days) : var.old_version_days
    }

    expiration {
      expired_object_delete_marker = true
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }
}

resource "aws_s3_bucket_object_lock_configuration" "backups" {
  bucket = aws_s3_bucket_versioning.this["backups"].bucket

  rule {
    default_retention {
      mode = "GOVERNANCE"
      days = var.backup_lock_days
    }
  }
}

data "aws_iam_policy_document" "bucket" {
  for_each = local.buckets

  source_policy_documents = concat(
    [templatefile("${path.module}/policies/tls_only.json", { bucket = local.bucket_arns[each.key] })],
    each.key == "adapters" ? [templatefile("${path.module}/policies/immutable.json", { objects = local.objects_arn })] : [],
  )
}

resource "aws_s3_bucket_policy" "this" {
  for_each = aws_s3_bucket_public_access_block.this # S3 takes one change of a bucket at a time

  bucket = each.value.bucket
  policy = data.aws_iam_policy_document.bucket[each.key].json
}

resource "aws_s3_bucket_logging" "this" {
  for_each = var.access_log_bucket == null ? {} : local.buckets

  bucket        = aws_s3_bucket.this[each.key].id
  target_bucket = var.access_log_bucket
  target_prefix = "${each.value}/"
}
