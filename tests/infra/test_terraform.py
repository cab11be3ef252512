"""The Terraform module for AWS: it fits together, promises what its pages say, and Terraform accepts it.

Terraform and its AWS provider are used where they are: the provider from the network, or from a folder of
plugins (``terraform init -plugin-dir``). Without them the files are read by python-hcl2.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

TERRAFORM = Path(__file__).resolve().parents[2] / "infra" / "terraform"
MODULE = TERRAFORM / "aws"
POLICIES = MODULE / "policies"
BLOCKS = ("resource", "data", "ephemeral")
#: Where Terraform's own installations, and people who mirror providers, keep them.
PLUGINS = (
    Path.home() / ".terraform.d/plugins",
    Path("/usr/share/terraform/plugins"),
    *Path("/opt").glob("*"),
)


def texts(folder: Path) -> dict[str, str]:
    """The files of a module, without comments."""
    found = {path.name: path.read_text() for path in sorted(folder.glob("*.tf"))}
    return {name: re.sub(r"(?m)(^|\s)#.*$", "", text) for name, text in found.items()}


def bare(value: Any) -> Any:
    """What python-hcl2 read, with plain strings and without its notes."""
    if isinstance(value, dict):
        return {bare(key): bare(one) for key, one in value.items() if not key.startswith("__")}
    if isinstance(value, list):
        return [bare(one) for one in value]
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value


def blocks(folder: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Blocks of a module by their address: ``aws_kms_key.data``, ``region``."""
    for path in sorted(folder.glob("*.tf")):
        for block in bare(hcl2.loads(path.read_text())).get(kind, []):
            for first, inner in block.items():
                if kind in BLOCKS:
                    yield from ((f"{first}.{second}", body) for second, body in inner.items())
                else:
                    yield first, inner


def local_names(folder: Path) -> set[str]:
    """Names of local values."""
    files = [bare(hcl2.loads(path.read_text())) for path in folder.glob("*.tf")]
    return {name for read in files for block in read.get("locals", []) for name in block}


def one(kind: str) -> dict[str, Any]:
    """The only resource of a type."""
    (found,) = [body for address, body in blocks(MODULE, "resource") if address.startswith(f"{kind}.")]
    return found


def test_every_reference_is_declared_and_everything_declared_is_used() -> None:
    text = "\n".join(texts(MODULE).values())
    variables = {name for name, _ in blocks(MODULE, "variable")}
    assert set(re.findall(r"\bvar\.(\w+)", text)) == variables
    assert set(re.findall(r"\blocal\.(\w+)", text)) == local_names(MODULE)
    resources = {address for address, _ in blocks(MODULE, "resource")}
    assert set(re.findall(r"(?<![\w.])(aws_\w+\.\w+)", text)) <= resources
    data = {address for address, _ in blocks(MODULE, "data")}
    assert set(re.findall(r"\bdata\.(aws_\w+\.\w+)", text)) == data
    made = {address for address, _ in blocks(MODULE, "ephemeral")}
    assert set(re.findall(r"\bephemeral\.(aws_\w+\.\w+)", text)) == made


def test_variables_and_outputs_are_described_and_what_is_typed_is_validated() -> None:
    free = {"tags", "access_log_bucket", "vpc_id", "database_instance_class", "namespace"}
    switches = {name for name, body in blocks(MODULE, "variable") if body["type"] == "bool"}
    people = {"approver_arns", "owner_arns"}
    for name, body in blocks(MODULE, "variable"):
        assert body["description"].endswith((".", ")")), name
        assert ("validation" in body) == (name not in free | switches | people), name
    for name, body in blocks(MODULE, "output"):
        assert body["description"], name


def test_the_example_gives_what_the_module_needs_and_nothing_else() -> None:
    ((_, given),) = blocks(TERRAFORM / "example", "module")
    needed = {name for name, body in blocks(MODULE, "variable") if "default" not in body}
    known = {name for name, _ in blocks(MODULE, "variable")}
    assert given["source"] == "../aws"
    assert needed <= given.keys() - {"source"} <= known
    # The example is the strict one: whatever makes production less safe is not switched off there.
    assert not {
        name
        for name in given
        if name.startswith("database_multi") or "protection" in name or name == "require_mfa"
    }


def test_policies_take_the_facts_that_they_are_given() -> None:
    text = texts(MODULE)
    facts = set(
        re.findall(r"(?m)^    (\w+) +=", text["identity.tf"].split("policy_facts = {")[1].split("\n  }")[0])
    )
    wanted = {
        path.stem: set(re.findall(r"\$\{(\w+)\}", path.read_text())) for path in POLICIES.glob("*.json")
    }
    assert wanted.pop("tls_only") == {"bucket"}
    assert wanted.pop("immutable") == {"objects"}
    assert set().union(*wanted.values()) <= facts
    used = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"does = \[(.*?)\]", text["identity.tf"]))))
    assert used == wanted.keys()
    for path in POLICIES.glob("*.json"):
        for statement in json.loads(path.read_text())["Statement"]:
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            resources = statement.get("Resource", statement.get("NotResource"))
            assert statement["Effect"] == "Deny" or not any("*" in action for action in actions), path.name
            within = resources if isinstance(resources, list) else [resources]
            assert all(one.startswith("${") for one in within), f"{path.name} names somebody else's"


def test_the_recorded_roles_are_the_modules() -> None:
    """`test_terraform_policies` judges the same roles that Terraform makes."""
    recorded = (Path(__file__).parent / "test_terraform_policies.py").read_text()
    judged = dict(
        re.findall(r'"([\w-]+)": \(((?:"\w+"(?:, )?)+),?\),', recorded.split("DOES = {")[1].split("\n}")[0])
    )
    text = texts(MODULE)["identity.tf"]
    made = dict(re.findall(r"(?m)^    ([\w-]+) +=? ?\{ does = \[(.*?)\]", text))
    assert {role: does.rstrip(", ") for role, does in judged.items()} == made
    signers = texts(MODULE)["keys.tf"].split("signers = {")[1].split("}")[0]
    for role, keys in {"publisher": 4, "approver": 2, "owner": 3, "maintenance": 1}.items():
        assert signers.count(f'"{role}"') == keys, role


def test_buckets_are_private_versioned_encrypted_and_kept() -> None:
    bucket = one("aws_s3_bucket")
    assert bucket["lifecycle"] == [{"prevent_destroy": True}]
    block = one("aws_s3_bucket_public_access_block")
    switches = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert all(block[name] is True for name in switches)
    assert one("aws_s3_bucket_versioning")["versioning_configuration"] == [{"status": "Enabled"}]
    (rule,) = one("aws_s3_bucket_server_side_encryption_configuration")["rule"]
    assert rule["apply_server_side_encryption_by_default"][0]["sse_algorithm"] == "aws:kms"
    (ages,) = one("aws_s3_bucket_lifecycle_configuration")["rule"]
    # Only what was deleted or replaced grows old: no rule may expire a current object.
    assert ages["expiration"] == [{"expired_object_delete_marker": True}]
    assert "noncurrent_version_expiration" in ages
    assert "days_after_initiation" in ages["abort_incomplete_multipart_upload"][0]
    for kind in ("policy", "public_access_block", "versioning", "ownership_controls"):
        assert one(f"aws_s3_bucket_{kind}")["for_each"].startswith("${aws_s3_bucket"), kind


def test_the_database_is_private_encrypted_and_can_be_brought_back() -> None:
    database = one("aws_db_instance")
    assert database["storage_encrypted"] is True
    assert database["publicly_accessible"] is False
    assert database["manage_master_user_password"] is True
    assert "password" not in database
    assert database["skip_final_snapshot"] is False
    assert database["backup_retention_period"] == "${var.database_backup_days}"
    assert database["multi_az"] == "${var.database_multi_az}"
    defaults = {name: body.get("default") for name, body in blocks(MODULE, "variable")}
    assert defaults["database_multi_az"] is True
    assert defaults["database_deletion_protection"] is True
    assert defaults["database_backup_days"] >= 7
    parameters = {each["name"]: each["value"] for each in one("aws_db_parameter_group")["parameter"]}
    assert parameters["rds.force_ssl"] == "1"
    rule = one("aws_vpc_security_group_ingress_rule")
    assert "cidr_ipv4" not in rule
    assert rule["from_port"] == rule["to_port"] == 5432


def test_keys_rotate_or_sign_and_none_is_lost() -> None:
    keys = {
        address: body for address, body in blocks(MODULE, "resource") if address.startswith("aws_kms_key.")
    }
    assert keys["aws_kms_key.data"]["enable_key_rotation"] is True
    signing = keys["aws_kms_key.signing"]
    assert (signing["key_usage"], signing["customer_master_key_spec"]) == ("SIGN_VERIFY", "ECC_NIST_P256")
    for body in keys.values():
        assert body["deletion_window_in_days"] == 30
        assert body["lifecycle"] == [{"prevent_destroy": True}]


def test_no_password_reaches_the_state() -> None:
    """Secrets are written by write-only arguments, from values that live while Terraform runs."""
    versions = [body for address, body in blocks(MODULE, "resource") if "secret_version" in address]
    assert len(versions) == 2
    for body in versions:
        assert "secret_string" not in body
        assert "ephemeral." in body["secret_string_wo"]
    assert "random_password" not in "\n".join(
        text for name, text in texts(MODULE).items() if name != "secrets.tf"
    )


def test_roles_trust_one_service_account_or_exact_workflows() -> None:
    (trust,) = [
        body for address, body in blocks(MODULE, "data") if address == "aws_iam_policy_document.trust"
    ]
    text = json.dumps(trust)
    assert "StringLike" not in text, "no wildcard decides who takes a role"
    for issuer in ("${local.issuer}", "token.actions.githubusercontent.com"):
        assert f'"{issuer}:sub"' in text
        assert f'"{issuer}:aud"' in text
    assert "aws:MultiFactorAuthPresent" in text


def test_the_kubernetes_overlay_names_outputs_roles_and_secrets_that_exist() -> None:
    overlay = TERRAFORM.parent / "kubernetes" / "overlays" / "prod"
    text = "\n".join(path.read_text() for path in sorted(overlay.glob("*.yaml")))
    outputs = {name for name, _ in blocks(MODULE, "output")}
    named = set(re.findall(r"#\s*(\w+_(?:role_arn|bucket|endpoint))\b", text))
    assert len(named) >= 5
    assert named <= outputs
    identity = texts(MODULE)["identity.tf"]
    roles = dict(re.findall(r'(?m)^    ([\w-]+) += \{ does = .*?service_account = "([\w-]+)"', identity))
    documents = [
        each for path in overlay.glob("*.yaml") for each in yaml.safe_load_all(path.read_text()) if each
    ]
    annotated = 0
    for document in documents:
        metadata = document.get("metadata", {})
        arn = (metadata.get("annotations") or {}).get("eks.amazonaws.com/role-arn")
        if document.get("kind") == "ServiceAccount" and arn:
            annotated += 1
            assert roles[arn.rpartition("role/adapter-foundry-")[2]] == metadata["name"]
    assert annotated >= 5
    secrets = set(re.findall(r"key: adapter-foundry/([\w-]+)", text))
    made = texts(MODULE)["secrets.tf"]
    databases = {
        f"{name}-database"
        for name in re.findall(r'"(\w+)"', made.split("databases = toset(")[1].split(")")[0])
    }
    assert secrets
    assert secrets <= databases | {"mlflow", "prefect", "serving"}


# -- by Terraform itself --


@pytest.fixture(scope="module")
def terraform(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs Terraform in a copy of infra/terraform, so that it leaves nothing in the checkout."""
    if shutil.which("terraform") is None:
        pytest.skip("there is no terraform")
    root = tmp_path_factory.mktemp("terraform") / "terraform"
    shutil.copytree(TERRAFORM, root)
    environment = os.environ | {
        "CHECKPOINT_DISABLE": "1",
        "TF_IN_AUTOMATION": "1",
        "TF_CLI_CONFIG_FILE": os.devnull,
    }

    def run(*words: str, folder: str | Path = "example") -> subprocess.CompletedProcess[str]:
        command = ["terraform", f"-chdir={root / folder}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.fixture(scope="module")
def initialised(terraform: Any) -> Any:
    """The same, with the AWS provider."""
    mirrors = [path for path in PLUGINS if (path / "registry.terraform.io/hashicorp/aws").is_dir()]
    options = [f"-plugin-dir={path}" for path in mirrors]
    done = terraform("init", "-backend=false", "-input=false", *options)
    if done.returncode != 0:
        pytest.skip(f"there is no AWS provider: {done.stderr.strip().splitlines()[-1:]}")
    return terraform


def test_terraform_finds_nothing_to_format(terraform: Any) -> None:
    done = terraform("fmt", "-check", "-recursive", "-diff", folder=".")
    assert done.returncode == 0, done.stdout


@pytest.mark.integration
@pytest.mark.slow
def test_terraform_accepts_it(initialised: Any) -> None:
    told = json.loads(initialised("validate", "-json").stdout)
    assert told["valid"], told["diagnostics"]
    assert told["warning_count"] == 0, told["diagnostics"]


@pytest.mark.parametrize("folder", ["good", "bad"])
def test_wrong_variables_are_refused(terraform: Any, tmp_path: Path, folder: str) -> None:
    """Terraform's own test command judges the validations, without a provider: they are about text alone."""
    shutil.copy(MODULE / "variables.tf", tmp_path)
    given = "".join(f"  {name} = {value}\n" for name, value in GIVEN.items())
    runs = [f"variables {{\n{given}}}\n"]
    for number, (name, value) in enumerate(WRONG if folder == "bad" else ()):
        refused = f"expect_failures = [var.{name}]\n  variables {{\n    {name} = {value}\n  }}"
        runs.append(f'run "wrong_{number}_{name}" {{\n  command = plan\n  {refused}\n}}\n')
    if folder == "good":
        runs.append('run "good" {\n  command = plan\n}\n')
    (tmp_path / "variables.tftest.hcl").write_text("\n".join(runs))
    for words in (("init", "-input=false"), ("test", "-no-color")):
        done = terraform(*words, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(runs) - 1} passed, 0 failed" in done.stdout


GIVEN = {
    "account_id": '"111122223333"',
    "region": '"eu-central-1"',
    "bucket_prefix": '"acme"',
    "vpc_id": '"vpc-1"',
    "database_subnet_ids": '["subnet-1", "subnet-2"]',
    "database_client_security_group_ids": '{ nodes = "sg-1" }',
}
WRONG = (
    ("account_id", '"1234"'),
    ("region", '"Frankfurt"'),
    ("bucket_prefix", '"a.b"'),
    ("store_prefix", '"../x"'),
    ("github_subjects", '["repo:acme/*:ref:refs/heads/main"]'),
    ("github_subjects", '["repo:acme/adapters:pull_request"]'),
    ("database_subnet_ids", '["subnet-1"]'),
    ("database_backup_days", "0"),
    ("database_client_security_group_ids", "{}"),
    ("oidc_provider_arn", '"https://oidc.eks"'),
)
