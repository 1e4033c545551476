"""Take the README's moving picture of the page: python tools/screenshot.py out/tiny/page.html

Needs the PyPI packages playwright and pillow, and Debian's chromium-headless-shell (make browser).
Writes assets/page.webp: the model writes, then one token is followed through its layers.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parent.parent / "assets" / "page.webp"
TEXT = """KING RICHARD:
What, is the king dead? The king is dead, my lord.

DUKE OF YORK:
O my lord, the king is"""
WIDTH, HEIGHT = 1280, 800  # of the window
SHRUNK = (960, 600)  # the picture
FRAME = 140  # milliseconds
QUALITY = 55  # of WebP
LONGEST_SCENE = 60  # frames
HELD = 8  # frames at the end of a scene
LONGEST_WAIT = 3000


def settle(page: Page) -> None:
    """Wait until the page shows what it was last asked for; its clock is ours."""
    for _ in range(LONGEST_WAIT):
        page.clock.run_for(20)
        page.wait_for_timeout(20)
        if page.evaluate("Boolean(window.app && app.settled())"):
            return
    raise SystemExit("the page does not settle")


def film(page: Page, frames: list[Image.Image], ended: str) -> None:
    """Add frames until a condition of JavaScript holds, and some more to look at its end."""
    for _ in range(LONGEST_SCENE):
        page.clock.run_for(FRAME)
        frames.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB").resize(SHRUNK))
        if page.evaluate(ended):
            break
    frames += frames[-1:] * HELD


def main() -> None:
    browser_path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    frames: list[Image.Image] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.clock.install(time=0)  # a slow machine takes the same picture
        page.goto(Path(sys.argv[1]).resolve().as_uri())
        page.clock.pause_at(60_000)
        settle(page)
        page.evaluate("text => app.setText(text)", TEXT)
        settle(page)
        film(page, frames, "true")
        page.get_by_role("button", name="Let it write").click()
        film(page, frames, "!document.querySelector('#opening .writing')")
        page.evaluate("text => app.setText(text)", TEXT)
        settle(page)
        page.evaluate("document.querySelector('#glance').scrollIntoView({ behavior: 'instant' })")
        settle(page)
        page.get_by_role("button", name="Follow").click()
        film(page, frames, "/next token/.test(document.querySelector('.told').textContent)")
    options = {"duration": FRAME, "loop": 0, "quality": QUALITY, "method": 4}
    frames[0].save(OUT, save_all=True, append_images=frames[1:], **options)
    print(f"wrote {OUT}: {OUT.stat().st_size:,} bytes, {len(frames)} frames")


if __name__ == "__main__":
    main()
