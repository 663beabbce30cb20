"""What went wrong with an object store, in a sentence: what was asked for, what was found, what to do.

A store answers a failed request with a status and, in the body, a code of its own inside XML; obstore prints both with
the whole request around them. Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html.
"""

import os
import re
from urllib.parse import urlsplit

from cache_builder.errors import CacheError

ABSENT = ("NoSuchBucket", "ContainerNotFound")
"""Codes of a bucket that is not there: S3's and Google's, and Azure's."""

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Variables that name one."""

IN_A_CLOUD = "http://169.254.169.254"
"""Who is asked for credentials where none are set; only machines of a cloud have an answer."""


def check_endpoint() -> None:
    """Refuse an endpoint that is no address at all: obstore panics at it.

    Raises:
        CacheError: names the variable.
    """
    for name in ENDPOINTS:
        value = os.environ.get(name, "")
        try:
            parts = urlsplit(value)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            good = False
        if value and not (good and re.fullmatch(r"[!-~]+", value)):
            raise CacheError(
                f"{name} is {value!r}, which is no address of an object store; write https://HOST or "
                "http://HOST:PORT, or unset it for AWS"
            )


def bucket_is_absent(error: BaseException) -> bool:
    """Is it the bucket that was not found, and not an object in it?"""
    return _code(str(error)) in ABSENT


def sentence(url: str, error: BaseException) -> str:
    """Why a request for an object below `url` failed.

    Args:
        url: of a prefix, e.g. `s3://bucket/photos.zarr`.
        error: obstore's.
    """
    text, bucket = str(error), urlsplit(url).netloc
    code, status = _code(text), _first(r"status code: (\d{3}[^:]*)", text)
    found = " ".join(part for part in (status, code) if part)
    asked = _first(r"https?://[^/\s]+", text)
    where = f"bucket {bucket!r}" + (f" at {asked}" if asked else "")
    if code in ABSENT:
        return f"there is no {where} ({found}): create it, or correct {url} or AWS_ENDPOINT_URL"
    if asked == IN_A_CLOUD:
        return (
            f"no credentials were found for bucket {bucket!r}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(AWS_SKIP_SIGNATURE=true for a public bucket)"
        )
    if status.startswith(("401", "403")):
        return (
            f"{where} refused the credentials ({found}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if they "
            "are temporary, AWS_SESSION_TOKEN, and that they may list, read and write the bucket; what is finished is "
            "kept"
        )
    if code in ("AuthorizationHeaderMalformed", "PermanentRedirect") or "configured region" in text:
        return (
            f"{where} lies in another region ({found or 'redirected'}): set AWS_REGION to its own"
        )
    if "builder error" in text and asked.startswith("http:"):
        return f"{where} was not asked, because that is no https: set AWS_ALLOW_HTTP=true if you mean it"
    if "error sending request" in text:
        return (
            f"{where} cannot be reached{_tries(text)}: check AWS_ENDPOINT_URL and the network; what is finished is "
            "kept"
        )
    if status.startswith("404"):
        return f"{where} is not there, nor any object store ({found}): correct AWS_ENDPOINT_URL"
    reason = f"answered {found}" if found else f"failed ({first_line(error)})"
    return (
        f"{where} {reason}{_tries(text)}; what is finished is kept: repeat when it can be reached"
    )


def _code(text: str) -> str:
    """What the store calls the error."""
    return _first(r"<Code>(\w+)</Code>", text)


def _tries(text: str) -> str:
    tries = _first(r"after (\d+) retries", text)
    return f", tried {int(tries) + 1} times" if tries else ""


def _first(pattern: str, text: str) -> str:
    """What a pattern finds, or its group; empty if nothing."""
    found = re.search(pattern, text)
    return found[found.re.groups].strip() if found else ""


def first_line(error: BaseException) -> str:
    """What an error says, without what follows it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition("<")[0][:300]
