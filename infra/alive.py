"""The container's health check: exit status 0 if the server beside it answers /livez. The standard library only, so that it is quick."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request


def main() -> int:
    has_tls = bool(os.environ.get("TARTAN_TLS_CERT"))
    context = ssl._create_unverified_context() if has_tls else None  # ourselves, through loopback
    url = f"{'https' if has_tls else 'http'}://127.0.0.1:{os.environ.get('TARTAN_PORT', '8080')}/livez"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=8) as answer:
            return int(answer.status != 200)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
