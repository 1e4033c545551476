"""Take the README's picture of the page: python tools/screenshot.py out/tiny/page.html

Needs the PyPI packages playwright and pillow, and a Chromium, as tests/test_page.py does.
"""

import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
FLAGS += "--disable-sync --no-first-run"
SIZE = {"width": 1280, "height": 800}
LIMIT = 200_000  # bytes
OUT = Path(__file__).parent.parent / "assets" / "page.png"
TEXT = """KING RICHARD:
What, is the king dead? The king is dead, my lord.

DUKE OF YORK:
O my lord, the king is"""
# What is selected: the head that looks most at what followed an earlier occurrence of the token.
SHOW = """() => {
  const heads = measureHeads(app.trace).flatMap((row, layer) =>
    row.map((m, head) => ({ layer, head, induction: m.induction ?? 0 })));
  const { layer, head } = heads.reduce((a, b) => (b.induction > a.induction ? b : a));
  app.change({ layer, head });
}"""


def find_browser() -> str:
    named = os.environ.get("PLAINLLAMA_BROWSER")
    path = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        sys.exit(f"error: no browser: install one of {', '.join(BROWSERS)}")
    return path


def settle(page: Page) -> None:
    """Wait until the page shows what it was last asked for."""
    page.wait_for_timeout(50)
    while not page.evaluate("Boolean(window.app && app.settled())"):
        page.wait_for_timeout(20)


def take(page_file: Path, out: Path) -> None:
    """Write a picture of the page to `out`."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=FLAGS.split())
        page = browser.new_page(viewport=SIZE)
        page.goto(page_file.resolve().as_uri())
        settle(page)
        page.evaluate("text => app.setText(text)", TEXT)
        settle(page)
        page.evaluate(SHOW)
        page.wait_for_timeout(500)
        page.screenshot(path=out)
        browser.close()
    with Image.open(out) as picture:  # 256 colours, which halve its size, are enough
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"usage: python {sys.argv[0]} out/RUN/page.html, as visualize.py writes it")
    take(Path(sys.argv[1]), OUT)
    size = OUT.stat().st_size
    if size > LIMIT:
        sys.exit(f"error: {OUT} has {size:,} bytes, more than {LIMIT:,}")
    print(f"wrote {OUT}: {size:,} bytes")


if __name__ == "__main__":
    main()
