"""What an S3 bucket knows beyond its objects: old versions of them, and its own settings. Through boto3, because obstore asks for neither.

Recovery (engine/index/undelete.py) and `tartan doctor` call this; no search, no write, no server does. boto3 is imported when a bucket is
opened: it takes a quarter of a second and belongs to the extra `aws`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from engine.errors import EngineError, InvalidRequest, NotFound, Unavailable
from engine.store.objects import StoreOptions

T = TypeVar("T")
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AllAccessDisabled", "403"}
_ABSENT = {"NoSuchKey", "NoSuchVersion", "NoSuchBucket", "404"}
_UNSET = {
    "NoSuchBucketPolicy",
    "NoSuchPublicAccessBlockConfiguration",
    "ServerSideEncryptionConfigurationNotFoundError",
    "NoSuchLifecycleConfiguration",
}


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an object, or a delete marker. modified_s is the store's clock."""

    version_id: str
    is_marker: bool
    size_bytes: int
    modified_s: float


@dataclass(frozen=True)
class BucketSettings:
    """None where we may not ask, or the server does not know the question.

    is_private   public access is blocked, or at least neither policy nor ACL opens the bucket
    expires_days a lifecycle rule deletes old versions after so many days; 0 if none does
    """

    is_versioned: bool | None
    encryption: str | None
    is_private: bool | None
    expires_days: int | None


class Bucket:
    """A bucket, below a prefix. Names are those of the store that was opened with the same URL."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self.client, self.bucket = client, bucket
        self.prefix = f"{prefix}/" if prefix else ""

    async def versions(self, folder: str) -> dict[str, list[Version]]:
        """Every version of every object whose name begins so, newest first. A page of a thousand a request. Needs s3:ListBucketVersions."""

        def read() -> dict[str, list[Version]]:
            found: dict[str, list[Version]] = {}
            for page in self.client.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=self.prefix + folder):
                for kind in ("Versions", "DeleteMarkers"):
                    for line in page.get(kind, ()):
                        version = Version(line["VersionId"], kind == "DeleteMarkers", line.get("Size", 0), line["LastModified"].timestamp())
                        place = len(found.setdefault(line["Key"].removeprefix(self.prefix), []))
                        found[line["Key"].removeprefix(self.prefix)].insert(0 if line["IsLatest"] else place, version)
            for versions in found.values():  # the latest is first; a tie of times between others keeps the store's order
                versions[1:] = sorted(versions[1:], key=lambda version: -version.modified_s)
            return found

        return await self._ask(read, folder)

    async def read(self, name: str, version: Version) -> bytes:
        """The bytes of a version. Needs s3:GetObjectVersion."""

        def read() -> bytes:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name, VersionId=version.version_id)
            data: bytes = answer["Body"].read()
            return data

        return await self._ask(read, name)

    async def remove_marker(self, name: str, version: Version) -> None:
        """Take a delete marker away, so that the version under it is the object again. Needs s3:DeleteObjectVersion."""
        if not version.is_marker:
            raise AssertionError("only markers are removed: a version would be lost for ever")
        await self._ask(lambda: self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name, VersionId=version.version_id), name)

    async def copy_back(self, name: str, version: Version) -> None:
        """Make an old version the object again, as a new version; the store copies, no bytes come here."""
        source = {"Bucket": self.bucket, "Key": self.prefix + name, "VersionId": version.version_id}
        await self._ask(lambda: self.client.copy_object(Bucket=self.bucket, Key=self.prefix + name, CopySource=source), name)

    async def settings(self) -> BucketSettings:
        """Versioning, encryption, privacy, expiry of versions. Five requests."""
        versioning = await self._asked_about("versioning")
        encryption = await self._asked_about("encryption")
        lifecycle = await self._asked_about("lifecycle_configuration")
        return BucketSettings(
            is_versioned=None if versioning is None else versioning.get("Status") == "Enabled",
            encryption=None if encryption is None else _algorithm(encryption),
            is_private=await self._is_private(),
            expires_days=None if lifecycle is None else _expiry_days(lifecycle),
        )

    async def _is_private(self) -> bool | None:
        block = await self._asked_about("public_access_block", "get_public_access_block")
        if block is not None and all(block.get("PublicAccessBlockConfiguration", {"": False}).values()):
            return True
        policy = await self._asked_about("policy_status")
        acl = await self._asked_about("acl")
        if policy is None and acl is None:
            return None
        opened = bool((policy or {}).get("PolicyStatus", {}).get("IsPublic"))
        everybody = [grant for grant in (acl or {}).get("Grants", ()) if "/groups/global/" in grant["Grantee"].get("URI", "")]
        return not opened and not everybody

    async def _asked_about(self, what: str, call: str = "") -> dict[str, Any] | None:
        """The answer to one question about the bucket; {} if nothing is set, None if there is no answer for us."""
        try:
            answer: dict[str, Any] = await self._ask(lambda: getattr(self.client, call or f"get_bucket_{what}")(Bucket=self.bucket), what)
            return answer
        except EngineError as error:
            return {} if error.details.get("cause") in _UNSET else None

    async def allows(self, call: str, **arguments: Any) -> bool:
        """Whether we may make a call of the S3 API; an answer that says anything but 'denied' counts as yes. Unavailable without an answer."""
        try:
            await self._ask(lambda: getattr(self.client, call)(**arguments), call)
        except Unavailable as error:
            if "outcome" in error.details:
                raise
            return error.code != "store-denied"
        except EngineError:
            return True
        return True

    async def _ask(self, call: Callable[[], T], name: str) -> T:
        """One call on a thread; boto's errors become ours."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return await asyncio.to_thread(call)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _ABSENT:
                raise NotFound("no such object or version", name=name, cause=code) from error
            if code in _DENIED:
                raise Unavailable("the store refused our credentials", code="store-denied", name=name, cause=code) from error
            raise Unavailable("the store failed", name=name, cause=code) from error
        except BotoCoreError as error:
            raise Unavailable("the store failed", name=name, cause=str(error), outcome="no answer") from error


def open_bucket(url: str, options: StoreOptions) -> Bucket:
    """The bucket behind s3://bucket/prefix. Makes no request. InvalidRequest for any other URL, or without boto3."""
    parts = urlsplit(url)
    if parts.scheme != "s3":
        raise InvalidRequest("only an S3 bucket keeps versions and settings", url=url)
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise InvalidRequest("this needs the extra: pip install tartan[aws]", url=url) from error
    session = boto3.Session(
        profile_name=options.profile,
        region_name=options.region,
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
        aws_session_token=options.session_token,
    )
    style = {"addressing_style": "path"} if options.endpoint else {}
    region = None if session.region_name else "us-east-1"
    config = Config(s3=style, retries={"mode": "standard", "max_attempts": 4}, connect_timeout=3, read_timeout=30)
    client = session.client("s3", endpoint_url=options.endpoint, region_name=region, config=config)
    return Bucket(client, parts.netloc, parts.path.strip("/"))


def _algorithm(answer: dict[str, Any]) -> str:
    """ "" if nothing is set."""
    rules = answer.get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
    return next(
        (str(rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"]) for rule in rules if "ApplyServerSideEncryptionByDefault" in rule),
        "",
    )


def _expiry_days(answer: dict[str, Any]) -> int:
    rules = [rule.get("NoncurrentVersionExpiration", {}) for rule in answer.get("Rules", []) if rule.get("Status") == "Enabled"]
    days = [int(rule["NoncurrentDays"]) for rule in rules if "NoncurrentDays" in rule]
    return min(days, default=0)
