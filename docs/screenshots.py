"""Makes the pictures of the server's page in README.md and docs/guides/serving.md again, of the code as it is.

    python docs/screenshots.py --checkpoint=runs/demo

The checkpoint is the one of `scripts/pretrain.sh`, whose scenes the page's examples are of. It needs requirements-serve.txt, playwright of
requirements-test.txt, and a chromium (`apt-get install chromium`). Each picture is looked at before it is committed.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "docs" / "guides"


def main() -> None:
    """Writes docs/guides/serving_page.jpg and serving_page_small.jpg."""
    parser = argparse.ArgumentParser(prog="python docs/screenshots.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="WORKDIR of the run of scripts/pretrain.sh")
    parser.add_argument("--out", type=Path, default=GUIDES, help="folder of the pictures; default: docs/guides")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("screenshots.py: no chromium on this machine: apt-get install chromium")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with served(arguments.checkpoint) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        wide(browser, address, arguments.out / "serving_page.jpg")
        small(browser, address, arguments.out / "serving_page_small.jpg")
        browser.close()


@contextlib.contextmanager
def served(checkpoint: str) -> Iterator[str]:
    """The address of a server of the checkpoint, in a process of its own."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [sys.executable, "-m", "glip_jax", "serve", f"--checkpoint={Path(checkpoint).resolve()}", "--port=0"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            while not (found := re.search(r"listening at (http\S+)/ without", Path(log.name).read_text())):
                if process.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.2)
            yield found[1]
        finally:
            process.terminate()
            process.wait()


def wide(browser: Browser, address: str, path: Path) -> None:
    """The first example, of which one phrase is not found."""
    page = browser.new_page(viewport={"width": 1120, "height": 800})
    example(page, address, 0)
    expect(page.locator("#status"), "the text beside the picture names a phrase that is not found").to_contain_text(
        "Not found"
    )
    save(page, path)


def small(browser: Browser, address: str, path: Path) -> None:
    """The second example on a small screen in dark mode, with the phrase "tulip" highlighted."""
    page = browser.new_page(viewport={"width": 390, "height": 780}, color_scheme="dark")
    example(page, address, 1)
    page.get_by_role("button", name=re.compile("^tulip: [0-9]")).focus()
    page.evaluate("scrollTo(0, 0)")
    expect(page.locator(".box.lit")).not_to_have_count(0)
    save(page, path)


def example(page: Page, address: str, number: int) -> None:
    """Opens an example, and waits for its boxes, above the lowest score that the server starts with."""
    page.goto(address)
    page.locator("#examples button").nth(number).click()
    expect(page.locator("#status")).to_contain_text("box", timeout=60_000)


def save(page: Page, path: Path) -> None:
    """Writes what the window shows."""
    page.wait_for_timeout(500)  # transitions end
    page.screenshot(path=path, type="jpeg", quality=88)
    print(f"written: {path}")
    page.close()


if __name__ == "__main__":
    main()
