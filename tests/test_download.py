"""download_pretrain.sh, run for real against a server on this machine."""

import hashlib
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from dynamicvit.models import ARCHS

SCRIPT = Path(__file__).parent.parent / "download_pretrain.sh"
# All that the script may use, besides one of curl and wget and one of sha256sum and shasum.
COREUTILS = ("sh", "dirname", "expr", "mkdir", "mv", "rm", "wc")
WEIGHTS = bytes(range(256)) * 400
LVVIT_REMOTE = "lvvit_s-26M-224-83.3.pth.tar"
LVVIT_LOCAL = "lvvit_s-224-83.3.pth.tar"
DEIT = "deit_tiny_patch16_224-a1311bcf.pth"


class Server(ThreadingHTTPServer):
    """Serves files from memory and notes each request as (name, Range header, answer)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None, int]] = []
        self.ranges = True  # False: every request gets the whole file
        self.cut: int | None = None  # break off after so many bytes
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        wanted = self.headers.get("Range")
        body = self.server.files.get(name)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        headers = {}
        if body is None:
            status, body = 404, b"an error page"
        elif start and start >= len(body):
            status, headers = 416, {"Content-Range": f"bytes */{len(body)}"}
            body = b"another error page"
        elif start:
            status, headers = 206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            body = body[start:]
        else:
            status = 200
        self.server.requests.append((name, wanted, status))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *args: object) -> None:
        pass


class Checkout:
    """A folder with a copy of the script, a PATH of chosen tools, and a server to download from."""

    def __init__(self, root: Path, server: Server) -> None:
        self.server = server
        self.script = root / "repo" / SCRIPT.name
        self.script.parent.mkdir()
        shutil.copy(SCRIPT, self.script)
        self.pretrained = self.script.parent / "pretrained"
        self.bin = root / "bin"
        self.bin.mkdir()
        self.home = root

    def provide(self, *tools: str) -> None:
        for tool in tools:
            path = shutil.which(tool)
            if path is None:
                pytest.skip(f"{tool} is not installed")
            (self.bin / tool).symlink_to(path)

    def run(self, *archs: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.home)}
        environment |= {"DEIT_URL": self.server.url, "LVVIT_URL": self.server.url + "/"}
        environment |= {"SWIN_URL": self.server.url, "CONVNEXT_URL": self.server.url}
        command = [str(self.bin / "sh"), str(self.script), *archs]
        return subprocess.run(command, env=environment, cwd=self.home, capture_output=True, text=True, timeout=10)

    def succeed(self, *archs: str) -> str:
        result = self.run(*archs)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    def fail(self, *archs: str) -> str:
        """The one line on stderr of a run that has to fail."""
        result = self.run(*archs)
        assert result.returncode != 0
        assert len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    def put(self, name: str, content: bytes) -> None:
        self.pretrained.mkdir(exist_ok=True)
        (self.pretrained / name).write_bytes(content)

    def saved(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.pretrained.iterdir()}

    def rename(self, published: str = DEIT) -> str:
        """Gives a DeiT file, in the copied script, a name that carries the hash of WEIGHTS."""
        old_hash = published.removesuffix(".pth")[-8:]
        name = published.replace(old_hash, hashlib.sha256(WEIGHTS).hexdigest()[:8])
        text = self.script.read_text()
        assert text.count(published) == 1
        self.script.write_text(text.replace(published, name))
        return name


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def bare(tmp_path: Path, server: Server) -> Checkout:
    """A checkout without any tool to download with."""
    checkout = Checkout(tmp_path, server)
    checkout.provide(*COREUTILS)
    return checkout


@pytest.fixture(params=["curl", "wget"])
def checkout(request: pytest.FixtureRequest, bare: Checkout) -> Checkout:
    bare.provide("sha256sum", request.param)
    return bare


def test_lvvit_is_saved_under_its_published_name(checkout: Checkout) -> None:
    checkout.server.files[LVVIT_REMOTE] = WEIGHTS
    checkout.succeed("lvvit_s")
    assert checkout.saved() == {LVVIT_LOCAL: WEIGHTS}


def test_right_hash_is_saved_and_then_left_alone(checkout: Checkout) -> None:
    name = checkout.rename()
    checkout.server.files = {name: WEIGHTS, LVVIT_REMOTE: WEIGHTS}
    checkout.succeed("deit_tiny", "lvvit_s")
    assert checkout.saved() == {name: WEIGHTS, LVVIT_LOCAL: WEIGHTS}
    assert len(checkout.server.requests) == 2
    assert checkout.succeed("deit_tiny", "lvvit_s").count("is there already") == 2
    assert len(checkout.server.requests) == 2


def test_wrong_hash_leaves_nothing(checkout: Checkout) -> None:
    checkout.server.files[DEIT] = WEIGHTS
    assert "sha256 is not a1311bcf" in checkout.fail("deit_tiny")
    assert checkout.saved() == {}


def test_wrong_file_is_replaced(checkout: Checkout) -> None:
    name = checkout.rename()
    checkout.server.files[name] = WEIGHTS
    checkout.put(name, WEIGHTS[:-1])
    assert "damaged" in checkout.succeed("deit_tiny")
    assert checkout.saved() == {name: WEIGHTS}


def test_wrong_file_does_not_outlive_a_failed_download(checkout: Checkout) -> None:
    checkout.put(DEIT, WEIGHTS)
    checkout.fail("deit_tiny")
    assert checkout.saved() == {}


def test_partial_download_is_resumed(checkout: Checkout) -> None:
    name = checkout.rename()
    checkout.server.files = {name: WEIGHTS, LVVIT_REMOTE: WEIGHTS}
    for partial in (f"{name}.part", f"{LVVIT_LOCAL}.part"):
        checkout.put(partial, WEIGHTS[:1000])
    checkout.succeed("deit_tiny", "lvvit_s")
    assert checkout.saved() == {name: WEIGHTS, LVVIT_LOCAL: WEIGHTS}
    assert checkout.server.requests == [(name, "bytes=1000-", 206), (LVVIT_REMOTE, "bytes=1000-", 206)]


def test_broken_off_download_goes_on_in_the_next_run(bare: Checkout) -> None:
    bare.provide("sha256sum", "curl")  # wget would try again by itself, after a pause
    bare.server.files[LVVIT_REMOTE] = WEIGHTS
    bare.server.cut = 1000
    assert "run this again to resume" in bare.fail("lvvit_s")
    assert bare.saved() == {f"{LVVIT_LOCAL}.part": WEIGHTS[:1000]}
    bare.server.cut = None
    bare.succeed("lvvit_s")
    assert bare.saved() == {LVVIT_LOCAL: WEIGHTS}
    assert bare.server.requests[-1] == (LVVIT_REMOTE, "bytes=1000-", 206)


def test_server_without_ranges(checkout: Checkout) -> None:
    checkout.server.files[LVVIT_REMOTE] = WEIGHTS
    checkout.server.ranges = False
    checkout.put(f"{LVVIT_LOCAL}.part", WEIGHTS[:1000])
    checkout.succeed("lvvit_s")
    assert checkout.saved() == {LVVIT_LOCAL: WEIGHTS}


def test_whole_part_of_the_right_hash_needs_no_server(checkout: Checkout) -> None:
    name = checkout.rename()
    checkout.put(f"{name}.part", WEIGHTS)
    checkout.succeed("deit_tiny")
    assert checkout.saved() == {name: WEIGHTS}


@pytest.mark.parametrize("part", [WEIGHTS, b"x" * len(WEIGHTS), WEIGHTS + b"more"], ids=["whole", "other", "too long"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_part_that_cannot_be_resumed(checkout: Checkout, part: bytes, ranges: bool) -> None:
    checkout.server.files[LVVIT_REMOTE] = WEIGHTS
    checkout.server.ranges = ranges
    checkout.put(f"{LVVIT_LOCAL}.part", part)
    checkout.succeed("lvvit_s")
    assert checkout.saved() == {LVVIT_LOCAL: WEIGHTS}
    assert checkout.server.requests[0] == (LVVIT_REMOTE, f"bytes={len(part)}-", 416 if ranges else 200)


def test_error_page_is_not_saved(checkout: Checkout) -> None:
    assert f"refused {checkout.server.url}/{LVVIT_REMOTE}" in checkout.fail("lvvit_s")
    assert checkout.saved() == {}


def test_error_keeps_what_was_downloaded(checkout: Checkout) -> None:
    checkout.put(f"{LVVIT_LOCAL}.part", WEIGHTS[:1000])
    checkout.fail("lvvit_s")
    assert checkout.saved() == {f"{LVVIT_LOCAL}.part": WEIGHTS[:1000]}


def test_no_server(checkout: Checkout) -> None:
    checkout.server.url = "http://127.0.0.1:1"
    assert "broke off" in checkout.fail("lvvit_s")
    assert checkout.saved() == {}


def test_empty_file_is_refused(checkout: Checkout) -> None:
    checkout.server.files[LVVIT_REMOTE] = b""
    assert "is empty" in checkout.fail("lvvit_s")
    assert checkout.saved() == {}


def test_without_arguments_as_the_published_script(checkout: Checkout) -> None:
    deit_small = checkout.rename("deit_small_patch16_224-cd65a155.pth")
    remote = (deit_small, LVVIT_REMOTE, "lvvit_m-56M-224-84.0.pth.tar")
    checkout.server.files = dict.fromkeys(remote, WEIGHTS)
    checkout.succeed()
    assert checkout.saved() == dict.fromkeys((deit_small, LVVIT_LOCAL, "lvvit_m-56M-224-84.0.tar"), WEIGHTS)


def test_archs_and_files_are_those_of_the_models(bare: Checkout) -> None:
    bare.provide("sha256sum", "curl")
    for arch, spec in ARCHS.items():
        if spec.weights is None:
            assert f"{arch} has no published dense weights" in bare.fail(arch)
        else:
            bare.put(f"{spec.weights}.part", b"begun")
            bare.fail(arch)
            _, resumed_from, _ = bare.server.requests.pop()
            assert resumed_from == "bytes=5-"


def test_unknown_arch_stops_before_any_download(checkout: Checkout) -> None:
    message = checkout.fail("lvvit_s", "deit_huge")
    assert "'deit_huge'" in message
    assert "deit_tiny deit_small deit_base lvvit_s lvvit_m" in message
    assert checkout.server.requests == []


def test_shasum_checks_as_well(bare: Checkout) -> None:
    bare.provide("shasum", "curl")
    bare.server.files[DEIT] = WEIGHTS
    assert "sha256 is not a1311bcf" in bare.fail("deit_tiny")
    name = bare.rename()
    bare.server.files[name] = WEIGHTS
    bare.succeed("deit_tiny")
    assert bare.saved() == {name: WEIGHTS}


def test_neither_curl_nor_wget(bare: Checkout) -> None:
    bare.provide("sha256sum")
    assert "needs curl or wget" in bare.fail("lvvit_s")


def test_neither_sha256sum_nor_shasum(bare: Checkout) -> None:
    bare.provide("curl")
    assert "needs sha256sum or shasum" in bare.fail("lvvit_s")


def test_folder_that_cannot_be_made(bare: Checkout) -> None:
    bare.provide("sha256sum", "curl")
    bare.pretrained.write_text("a file")
    assert "cannot write to" in bare.fail("lvvit_s")
