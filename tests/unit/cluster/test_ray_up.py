"""cluster/aws.yaml and gcp.yaml: Ray's own schema, and the rules of cluster/README.md."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[3] / "cluster"
README = (CLUSTER / "README.md").read_text()
SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"

WORLD = ("0.0.0.0/0", "::/0")


@pytest.fixture(params=["aws", "gcp"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return loaded


def validate(config: dict[str, Any]) -> None:
    jsonschema.validate(config, json.loads(SCHEMA.read_text()))


def test_it_is_what_ray_reads(config: dict[str, Any]) -> None:
    validate(config)
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        validate(config | {"max_worker": 3})


def test_rays_launcher_takes_it(config: dict[str, Any]) -> None:
    """Filled in as `ray up` does, it is still valid, and nothing installs another Ray into the image."""
    full = prepare_config(config)
    validate_config(full)
    assert not any("pip install" in line for key, value in full.items() if key.endswith("_commands") for line in value)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A simulated AWS account with what README.md says to make first; yields what replaces which word."""
    moto = pytest.importorskip("moto")
    import boto3

    # Ray keeps the private key that it makes in ~/.ssh.
    for name, value in {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    with moto.mock_aws():
        ec2, iam = boto3.client("ec2", "us-west-2"), boto3.client("iam", "us-west-2")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24", AvailabilityZone="us-west-2a")["Subnet"]
        ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": True})
        for name in ("head", "worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield {
            "REPLACE_SECURITY_GROUP": ec2.create_security_group(GroupName="g", Description="g", VpcId=vpc)["GroupId"],
            "REPLACE_AMI": ec2.describe_images()["Images"][0]["ImageId"],
            "REPLACE_HEAD_PROFILE": "head",
            "REPLACE_WORKER_PROFILE": "worker",
        }


def open_groups(ec2: Any) -> list[str]:
    groups = ec2.describe_security_groups()["SecurityGroups"]
    return [group["GroupName"] for group in groups if any(range_ in str(group["IpPermissions"]) for range_ in WORLD)]


@pytest.mark.slow
def test_nodes_on_a_simulated_aws(account: dict[str, str]) -> None:
    """Ray's launcher starts the nodes in the group that was given, spot where it should be, and opens nothing."""
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    ec2 = boto3.client("ec2", "us-west-2")
    text = (CLUSTER / "aws.yaml").read_text()
    for word, value in account.items():
        text = text.replace(word, value)
    config = bootstrap_aws(prepare_config(yaml.safe_load(text)))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for node_type in config["available_node_types"].values():
        provider.create_node(node_type["node_config"], {"ray-node-type": "any"}, 1)
    nodes = [node for batch in ec2.describe_instances()["Reservations"] for node in batch["Instances"]]
    assert [node.get("InstanceLifecycle") for node in nodes] == [None, "spot"]
    groups = [[group["GroupId"] for group in node["SecurityGroups"]] for node in nodes]
    assert groups == [[account["REPLACE_SECURITY_GROUP"]]] * 2
    assert all(node["MetadataOptions"]["HttpTokens"] == "required" for node in nodes)
    assert open_groups(ec2) == []

    without = prepare_config(yaml.safe_load(text))
    for node_type in without["available_node_types"].values():
        del node_type["node_config"]["SecurityGroupIds"]
        node_type["node_config"]["SubnetIds"] = [nodes[0]["SubnetId"]]
    bootstrap_aws(without)
    assert open_groups(ec2) == ["ray-autoscaler-dngd"], "what the group of one's own is for"


def test_it_scales_on_spot_gpu_nodes(name: str, config: dict[str, Any]) -> None:
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["resources"]["GPU"] == 1
    assert worker["min_workers"] < worker["max_workers"] <= config["max_workers"]
    node = worker["node_config"]
    spot = node["InstanceMarketOptions"]["MarketType"] if name == "aws" else node["scheduling"]["provisioningModel"]
    assert spot.lower() == "spot"
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}, "the head is for drivers, not for training"
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "scheduling" not in head["node_config"], "a head taken back ends every run"


def test_nothing_is_open_to_the_world(name: str, config: dict[str, Any]) -> None:
    text = (CLUSTER / f"{name}.yaml").read_text()
    assert not any(range_ in text for range_ in WORLD)
    for node_type in config["available_node_types"].values():
        if name == "aws":
            # Without a group of one's own Ray makes one that opens port 22 to the internet.
            assert node_type["node_config"]["SecurityGroupIds"] == ["REPLACE_SECURITY_GROUP"]
            assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        else:
            [interface] = node_type["node_config"]["networkInterfaces"]
            assert interface["subnetwork"].endswith("/subnetworks/dngd"), "not the default network, open on port 22"
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "security_group" not in config["provider"]


def test_the_readme_opens_nothing_to_the_world() -> None:
    assert not any(range_ in README for range_ in WORLD)
    opened = re.findall(r"--(?:cidr|source-ranges) (\S+)", README)
    assert sorted(set(opened)) == ["10.10.0.0/20", "YOUR_ADDRESS/32"]


def test_the_token_is_on_every_node(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["/var/lib/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    assert not any("RAY_AUTH_MODE" in option for option in config["docker"]["run_options"]), "the image has it on"


def test_mounts_do_not_depend_on_where_ray_up_is_run(config: dict[str, Any]) -> None:
    assert all(local.startswith("~/") for local in config["file_mounts"].values())


def test_the_container_has_no_more_than_it_needs(config: dict[str, Any]) -> None:
    options = config["docker"]["run_options"]
    assert "--cap-drop ALL" in options
    assert "--security-opt no-new-privileges" in options
    assert not any("privileged" in option.removeprefix("--security-opt no-new-") for option in options)
    assert "--volume /mnt/nvme/dngd:/cache" in options, "stores are staged on the node's NVMe"
    assert "DNGD_CACHE_DIR=/cache/dngd" in (CLUSTER / "Dockerfile").read_text()


def test_runs_are_copied_to_object_storage(name: str, config: dict[str, Any]) -> None:
    scheme = {"aws": "s3", "gcp": "gs"}[name]
    [line] = [line for line in config["head_start_ray_commands"] if "sync_runs.py" in line]
    assert f"python /opt/dngd/sync_runs.py /shared/runs {scheme}://REPLACE_BUCKET/runs" in line
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert "WORKDIR /opt/dngd" in dockerfile
    assert "cluster/sync_runs.py ./" in dockerfile


def test_shell_commands_parse(config: dict[str, Any]) -> None:
    commands = [line for key, value in config.items() if key.endswith("_commands") for line in value]
    assert len(commands) >= 7
    for command in commands:
        # As Ray sends them.
        sent = f"true && source ~/.bashrc && export OMP_NUM_THREADS=1 && ({command})"
        done = subprocess.run(["bash", "-n"], input=sent, text=True, capture_output=True)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stderr == "", command


def test_what_is_to_be_replaced_is_in_the_readme(name: str) -> None:
    words = set(re.findall(r"REPLACE_[A-Z_]+", (CLUSTER / f"{name}.yaml").read_text()))
    section = README.split({"aws": "## AWS", "gcp": "## Google Cloud"}[name])[1].split("\n## ")[0]
    assert words == set(re.findall(r"REPLACE_[A-Z_]+", section))
