"""A web browser for tests: Chromium, driven by chromedriver's protocol, and a server of a folder on this computer."""

import contextlib
import functools
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

CHROMIUM = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
IS_HERE = bool(CHROMIUM and DRIVER)
ARGUMENTS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
ARGUMENTS += " disable-component-update disable-sync disable-dev-shm-usage"
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class Browser:
    """A page's window. Errors: RuntimeError with the driver's or the script's message."""

    def __init__(self, driver, profile):
        self._driver = driver
        arguments = [f"--{name}" for name in ARGUMENTS.split()] + [f"--user-data-dir={profile}"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "timeouts": {"script": 120_000}}}}
        self._session = f"{driver}/session/{self._ask('POST', f'{driver}/session', wanted)['sessionId']}"

    def _ask(self, method, address, values=None):
        body = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, address):
        self._ask("POST", f"{self._session}/url", {"url": address})

    def run(self, script, *arguments):
        """What a script returns; it may await."""
        text = f"const done = arguments[arguments.length - 1]; (async () => {{ {script} }})()"
        text += ".then(value => done({value}), error => done({error: String(error)}))"
        answer = self._ask("POST", f"{self._session}/execute/async", {"script": text, "args": list(arguments)})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def wait(self, condition, seconds=60):
        """Waits until a JavaScript expression is true, and returns its value."""
        for _ in range(10 * seconds):
            if value := self.run(f"return {condition}"):
                return value
            time.sleep(0.1)
        raise RuntimeError(f"never true: {condition}; the page says: {self.run('return document.body.innerText')}")

    def command(self, name, values):
        """A command of the browser's own protocol, for instance of the size of its window."""
        return self._ask("POST", f"{self._session}/goog/cdp/execute", {"cmd": name, "params": values})

    def close(self):
        self._ask("DELETE", self._session)


@contextlib.contextmanager
def browser(profile):
    """profile: an empty folder for the browser's own files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{driver}/status", timeout=10):
                break
            time.sleep(0.1)
        window = Browser(driver, profile)
        try:
            yield window
        finally:
            window.close()
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def running(server):
    """The address of a server, which answers meanwhile."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def served(folder, headers=None):
    """The address of a server of a folder. headers: of every answer."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    with running(server) as address:
        yield address
