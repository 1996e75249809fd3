"""The few calls that are made to an S3 server, and its refusals in words.

boto3 finds credentials, the region, servers other than Amazon's (AWS_ENDPOINT_URL) and how often to try again
(AWS_MAX_ATTEMPTS) as it does everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, RunError

SCHEME = "s3://"
_MOST_KEYS = 1000  # that one request may delete
_STREAMS = 4  # parts under way at a time


@dataclass(frozen=True)
class Bucket:
    """A folder of a bucket."""

    name: str
    """Of the bucket."""
    prefix: str
    """Of its keys, "" or ending with a slash."""
    client: Any
    """Client of boto3."""
    transfer: Any
    """Transfer settings of boto3."""

    @staticmethod
    def open(address: str, part_size: int) -> Bucket:
        """Nothing is asked of the server yet. address: s3://bucket/folder. part_size: of one request [bytes].

        Raises ConfigError where boto3 is not installed or cannot work with the environment's settings.
        """
        try:
            import boto3
            from boto3.s3.transfer import TransferConfig
            from botocore.exceptions import BotoCoreError
        except ModuleNotFoundError as error:
            raise ConfigError.of(
                f"copying to S3 needs the package {error.name}, which is not installed",
                key="s3_path",
                value=address,
                hint="pip install neox[s3]",
            ) from error
        name, _, prefix = address.removeprefix(SCHEME).partition("/")
        prefix = prefix.strip("/")
        try:
            client = boto3.client("s3")
        except (BotoCoreError, ValueError) as error:
            raise ConfigError.of(f"boto3 cannot start: {error}", key="s3_path", value=address) from error
        transfer = TransferConfig(
            multipart_threshold=part_size, multipart_chunksize=part_size, max_concurrency=_STREAMS
        )
        return Bucket(name, f"{prefix}/" if prefix else "", client, transfer)

    def address(self, key: str = "") -> str:
        """The address of a key, s3://bucket/key."""
        return f"{SCHEME}{self.name}/{self.prefix}{key}"

    def upload(self, path: Path, key: str) -> None:
        """Copies a file there. RunError with the server's reason."""
        with self._reported("writing", key):
            self.client.upload_file(str(path), self.name, self.prefix + key, Config=self.transfer)

    def download(self, key: str, path: Path) -> None:
        """Copies a file from there. RunError with the server's reason."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._reported("reading", key):
            self.client.download_file(self.name, self.prefix + key, str(path), Config=self.transfer)

    def write(self, key: str, text: str) -> None:
        """Puts a small text there. RunError with the server's reason."""
        with self._reported("writing", key):
            self.client.put_object(Bucket=self.name, Key=self.prefix + key, Body=text.encode())

    def read(self, key: str) -> str | None:
        """A small text from there; None where there is none. RunError with the server's reason."""
        with self._reported("reading", key):
            try:
                return str(self.client.get_object(Bucket=self.name, Key=self.prefix + key)["Body"].read().decode())
            except self.client.exceptions.NoSuchKey:
                return None

    def keys(self, under: str) -> list[str]:
        """All keys that begin so. RunError with the server's reason."""
        with self._reported("listing", under):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix + under)
            return [entry["Key"].removeprefix(self.prefix) for page in pages for entry in page.get("Contents", ())]

    def folders(self) -> list[str]:
        """The names of the folders inside. RunError with the server's reason."""
        with self._reported("listing", ""):
            pages = self.client.get_paginator("list_objects_v2")
            found = pages.paginate(Bucket=self.name, Prefix=self.prefix, Delimiter="/")
            paths = [entry["Prefix"] for page in found for entry in page.get("CommonPrefixes", ())]
            return [path.removeprefix(self.prefix).rstrip("/") for path in paths]

    def remove(self, keys: Sequence[str]) -> None:
        """Deletes; a key that is not there is no error. RunError with the server's reason."""
        for start in range(0, len(keys), _MOST_KEYS):
            named = [{"Key": self.prefix + key} for key in keys[start : start + _MOST_KEYS]]
            with self._reported("removing", keys[start]):
                answer = self.client.delete_objects(Bucket=self.name, Delete={"Objects": named, "Quiet": True})
            for refused in answer.get("Errors", ()):
                raise RunError.of(f"removing it failed: {refused.get('Message')}", location=f"{SCHEME}{refused['Key']}")

    def probe(self) -> None:
        """Writes and removes a small file, so that a bucket that refuses is reported before training. RunError."""
        self.write(".write-test", "")
        self.remove([".write-test"])

    @contextmanager
    def _reported(self, action: str, key: str) -> Iterator[None]:
        """What boto3 raises, as a RunError that says where and what to look at."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise RunError.of(
                f"{action} failed: {str(error).splitlines()[0]}",
                location=self.address(key),
                hint="look at s3_path, the credentials and AWS_ENDPOINT_URL",
            ) from error
