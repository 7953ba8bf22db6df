"""`python -m support.ask URL TIMEOUT_S`: one request with the body on standard input; runs inside a namespace."""

import sys
import urllib.error
import urllib.request


def main() -> None:
    url, timeout_s = sys.argv[1:]
    body = sys.stdin.read()
    data = None if body == "null" else body.encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=float(timeout_s)) as response:
            sys.stdout.write(response.read().decode())
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {error.read().decode()}")
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
