"""Pages in a real browser without a window: what of them does not fit its width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Every page in a frame of every width. An element overflows if its content is wider than it is, and if it ends right of
# the page. What .scroll and pre hold may be scrolled, and a dot may stand half beside the end of its track.
MEASURE = """<!doctype html><style>iframe { border: 0; height: 800px }</style>
<script>
const ALLOWED = "pre, .scroll, .track";
function overflowing(view) {
  const root = view.document.documentElement, found = [];
  for (const details of view.document.querySelectorAll("details")) details.open = true;
  if (root.scrollWidth > root.clientWidth) found.push(`the page is ${root.scrollWidth} wide`);
  for (const element of view.document.body.querySelectorAll("*")) {
    const style = view.getComputedStyle(element);
    if (style.display === "inline" || element.closest(ALLOWED)) continue;
    const box = element.getBoundingClientRect();
    const cut = element.scrollWidth > element.clientWidth + 1, outside = box.right > root.clientWidth + 0.5;
    const name = `${element.tagName}.${element.className}`;
    if (cut || outside) found.push(`${name}: ${element.textContent.trim().slice(0, 60)}`);
  }
  return found;
}
window.onload = () => {
  const result = [...document.querySelectorAll("iframe")].map(frame => ({
    page: frame.src.split("/").pop(), width: frame.contentWindow.innerWidth,
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
    pictures: [...frame.contentDocument.images].map(image => image.currentSrc.slice(-40)),
    overflowing: overflowing(frame.contentWindow),
  }));
  document.body.textContent = JSON.stringify(result);
};
</script><body>"""


def find_browser():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def layouts(pages, widths, folder, *, dark):
    """For each page and width what overflows there, and which of the light and dark pictures is shown."""
    frames = (f'<iframe src="{page.as_uri()}" style="width: {width}px"></iframe>' for page in pages for width in widths)
    (folder / "frames.html").write_text(MEASURE + "".join(frames), encoding="utf-8")
    command = [
        find_browser(), "--headless", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--no-sandbox",  # Chromium's sandbox does not start for root
        (folder / "frames.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=True)
    (content,) = re.findall("<body>(.*)</body>", done.stdout, re.DOTALL)
    return json.loads(html.unescape(content))
