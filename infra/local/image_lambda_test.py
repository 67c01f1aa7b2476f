"""Start the encoder function's image in AWS's runtime emulator, as user 10001 on a read-only root with /tmp, and let it encode; `make image-lambda-test`.

Needs buildah, root, and the emulator, which comes with the package aws-sam-cli (lambda_gateway.py says where it is looked for). MODEL is a folder with a
ColBERT model in ONNX, which the function finds below /tmp; without it the built-in encoder answers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.local.image_test import Container, out
from infra.local.lambda_gateway import find_emulator, free_port

TEXTS = ["a bridge destroyed by wind", "a telescope"]


def main(image: str, model: str) -> int:
    emulator = find_emulator()
    if emulator is None:
        print("aws-lambda-rie is needed: it comes with the package aws-sam-cli", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        shutil.copy(emulator, f"{folder}/rie")
        if model:
            shutil.copytree(model, f"{folder}/model")
        out("chown", "-R", "10001:10001", folder)
        container = Container(image, Path(folder), writable="/tmp")
        try:
            check(container, "/tmp/model" if model else "hashing")
        finally:
            container.close()
    print("the encoder's image is good")
    return 0


def check(container: Container, model: str) -> None:
    port = free_port()
    command = ["/tmp/rie", "--runtime-interface-emulator-address", f"127.0.0.1:{port}", "--runtime-api-address", f"127.0.0.1:{free_port()}"]
    function = {"AWS_LAMBDA_FUNCTION_NAME": "encoder", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "2048", "AWS_LAMBDA_FUNCTION_TIMEOUT": "600"}
    own = {"TARTAN_INDEX_DIR": "/tmp/indices", "TARTAN_MODEL": model, "TARTAN_EPHEMERAL_MB": "512", "HOME": "/tmp"}
    own["TARTAN_MODEL_INT8"] = str((container.volume / "model/model_int8.onnx").exists()).lower()
    running = container.start(*command, *container.config["Entrypoint"], *container.config["Cmd"], **function, **own)
    try:
        for which in ("cold", "warm"):
            began_s = time.perf_counter()
            answer = encode(port)
            ms = (time.perf_counter() - began_s) * 1000
            assert answer["statusCode"] == 200, answer
            body = json.loads(answer["body"])
            assert len(body["embeddings"]) == len(TEXTS), answer
            print(f"{which}: {len(TEXTS)} texts, {ms:.0f} ms, {len(body['embeddings'][0][0])} dimensions")
    finally:
        running.terminate()
        running.wait(30)


def encode(port: int) -> Any:
    """One event of an HTTP API through the emulator, which may not listen yet."""
    http = {"method": "POST", "path": "/encode", "protocol": "HTTP/1.1", "sourceIp": "127.0.0.1", "userAgent": "test"}
    event = {
        "version": "2.0",
        "routeKey": "POST /encode",
        "rawPath": "/encode",
        "rawQueryString": "",
        "headers": {"content-type": "application/json", "host": "localhost"},
        "requestContext": {"http": http, "stage": "$default", "requestId": "r", "domainName": "localhost"},
        "body": json.dumps({"texts": TEXTS, "input_type": "document"}),
        "isBase64Encoded": False,
    }
    address = f"http://127.0.0.1:{port}/2015-03-31/functions/function/invocations"
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, json.dumps(event).encode()), timeout=900) as answer:
                return json.load(answer)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], os.environ.get("MODEL", "")))
