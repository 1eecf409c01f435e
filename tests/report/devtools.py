"""A headless Chromium, driven over a pipe with the Chrome DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
CHROMIUM = os.environ.get("KVPLAN_CHROMIUM") or next((path for path in map(shutil.which, NAMES) if path), None)
ANSWER_SECONDS = 60


class Browser:
    """One browser process with one page. `problems` are its console errors and warnings, `requests` the addresses that it asked for."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="kvplan-chromium-")
        self.problems, self.requests, self.received, self.next_id = [], [], b"", 0
        ends = (*os.pipe(), *os.pipe())
        # Above the places that the protocol gives them in the browser.
        from_us, self.to_browser, self.from_browser, to_us = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
        for end in ends:
            os.close(end)

        def take_ends():
            os.dup2(from_us, 3)
            os.dup2(to_us, 4)

        # No sandbox: containers of CI have no user namespaces, and the pages are our own.
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
             "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe", f"--user-data-dir={self.profile}",
             "--window-size=1280,1000", "about:blank"],
            preexec_fn=take_ends, pass_fds=(3, 4), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(from_us)
        os.close(to_us)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility", "DOM"):
            self.call(domain + ".enable")

    def close(self):
        try:
            self.session = None
            self.call("Browser.close")
        except (OSError, RuntimeError):
            self.process.kill()
        self.process.wait()
        os.close(self.to_browser)
        os.close(self.from_browser)
        shutil.rmtree(self.profile, ignore_errors=True)

    def read(self):
        """The next message; each ends with a zero byte."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.from_browser], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.from_browser, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser ended" if ready else f"no answer from the browser within {ANSWER_SECONDS} s")
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        message = json.loads(message)
        self.note(message.get("method"), message.get("params", {}))
        return message

    def note(self, event, params):
        if event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def call(self, method, **params):
        self.next_id += 1
        message = {"id": self.next_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to_browser, data):]
        while True:
            answer = self.read()
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, path):
        """Loads a file; forgets the problems and requests of the page before."""
        self.problems.clear()
        self.requests.clear()
        self.call("Page.navigate", url=pathlib.Path(path).as_uri())
        self.evaluate("new Promise((done) => { if (document.readyState === 'complete') done(); else addEventListener('load', done); })")

    def evaluate(self, expression):
        """The value of a JavaScript expression or promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {json.dumps(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def press(self, key, times=1, shift=False):
        """A key as the keyboard sends it; `key` is a KeyboardEvent.key."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") else {}
        shared = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", **shared, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def point_at(self, selector, click=False):
        """Moves the mouse onto the first element of a selector."""
        x, y = self.evaluate(f"""(() => {{
            const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: 'center'}});
            const at = node.getBoundingClientRect();
            return [at.left + at.width / 2, at.top + at.height / 2];
        }})()""")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
