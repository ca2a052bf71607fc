"""Serve a model over OpenAI's API, on this machine.

    python jobs/serve.py --model embedded --port 8000
    curl http://127.0.0.1:8000/v1/models

Keys come from HIRED_API_KEY, commas between them, or --api-key-file. Without keys it answers to this machine
alone. SIGTERM or Ctrl-C lets what is begun end. On a cluster: serve deploy serve.yaml. Exit codes: 0 when it
was asked to end, 2 for a configuration error, 1 otherwise.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, where nothing is installed

from hired.errors import ConfigurationError
from hired.vlm import resolve
from pipeline.serve import door
from pipeline.serve.keys import Keys
from pipeline.serve.options import Address, from_command_line
from pipeline.serve.settings import Settings

log = logging.getLogger("serve")

START_TIMEOUT_S = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings, address = from_command_line(arguments)
        keys = Keys.read(os.environ, settings.api_key_file)
        check_exposure(settings, address, keys)
        resolve(settings.model)
        run(settings, address, keys)
    except ConfigurationError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except Exception:
        log.exception("the endpoint failed")
        return 1
    return 0


def check_exposure(settings: Settings, address: Address, keys: Keys) -> None:
    """Raises ConfigurationError where everybody on the network could ask without a key."""
    if keys or settings.without_keys or _is_loopback(address.host):
        return
    raise ConfigurationError(
        f"--host {address.host} can be reached from elsewhere and there are no API keys: put some into "
        "HIRED_API_KEY (`openssl rand -hex 24` makes one) or name a file by --api-key-file, or say "
        "--without-keys if everybody may ask"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(settings: Settings, address: Address, keys: Keys) -> None:
    """Serves until it is asked to end, and then until what is begun has ended."""
    import ray
    from ray import serve

    from pipeline.cluster import start
    from pipeline.serve.deployments import application

    os.environ.update(door.environment(settings.limits.in_flight, settings.limits.retry_after_s))
    start(_node_ip_address="127.0.0.1", configure_logging=False)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": address.host, "port": address.port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        ingress = serve.run(application(settings, keys), name="hired")
        asked_to_end = signalled()
        print(f"serving {settings.model_name} at http://{address.host}:{address.port}", flush=True)
        asked_to_end.wait()
        log.info("ending; what is begun goes on for %g s at most", settings.limits.request_s)
        end_s = time.monotonic() + settings.limits.request_s
        while ingress.drain.remote().result() and time.monotonic() < end_s:
            time.sleep(0.2)
        serve.shutdown()
    finally:
        ray.shutdown()


def signalled() -> threading.Event:
    """Is set by SIGTERM and by Ctrl-C; to be made after Ray's start, which brings handlers of its own."""
    event = threading.Event()

    def handle(*_: object) -> None:
        # Whoever waits may hold the event's lock in this very thread.
        threading.Thread(target=event.set, daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return event


if __name__ == "__main__":
    sys.exit(main())
