"""A local S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

CANARY = "canary-8f1d6c"  # a secret, which nothing may show


@pytest.fixture(scope="session")
def s3():
    """The URL of a local S3 server."""
    moto = pytest.importorskip("moto.server", reason="pip install -e '.[test]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3, monkeypatch):
    """A function that puts a folder into a bucket; sets the environment in which the bucket is found."""
    import boto3

    settings = {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "AWS_SESSION_TOKEN": f"{CANARY}-token",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3)

    def put(folder: Path, name: str) -> str:
        client.create_bucket(Bucket=name)
        for path in folder.iterdir():
            client.upload_file(str(path), name, f"some/where/{path.name}")
        return f"s3://{name}/some/where"

    put.client = client
    return put
