"""Take the README's picture of the page: python tools/screenshot.py out/tiny/page.html

Needs the PyPI package playwright and Debian's chromium-headless-shell (make browser). Writes
assets/page.png.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parent.parent / "assets" / "page.png"
TEXT = """KING RICHARD:
What, is the king dead? The king is dead, my lord.

DUKE OF YORK:
O my lord, the king is"""
# Selects the head that looks most at what followed an earlier occurrence of the token.
SELECT = """() => {
  const heads = measureHeads(app.trace).flatMap((row, layer) =>
    row.map((m, head) => ({ layer, head, induction: m.induction ?? 0 })));
  const { layer, head } = heads.reduce((a, b) => (b.induction > a.induction ? b : a));
  app.change({ layer, head });
}"""


def settle(page: Page) -> None:
    """Wait until the page shows what it was last asked for."""
    page.wait_for_timeout(50)
    page.wait_for_function("() => Boolean(window.app && app.settled())", timeout=120_000)


def main() -> None:
    browser_path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(Path(sys.argv[1]).resolve().as_uri())
        settle(page)
        page.evaluate("text => app.setText(text)", TEXT)
        settle(page)
        page.evaluate(SELECT)
        page.wait_for_timeout(500)
        page.screenshot(path=OUT)
    print(f"wrote {OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
