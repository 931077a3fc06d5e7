"""The page in a browser at the width of a phone, where Chromium is installed."""

import html
import json
import re
import shutil
import subprocess

import pytest

from dq_lightning import QuantizedDataModule
from dq_lightning.demo.sample_data import SampleCIFAR10

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# opens the page in a frame as wide as a phone, points at a kept sample, presses keys and buttons, and writes what it saw
PROBE = """<!doctype html><iframe id="frame" src="PAGE" style="width:390px;height:800px;border:0"></iframe><pre id="seen"></pre>
<script>frame.onload = () => {
  const page = frame.contentDocument, window_ = frame.contentWindow, seen = {};
  const chart = page.getElementById("map-chart"), said = page.getElementById("map-said");
  seen.fits = page.documentElement.scrollWidth <= page.documentElement.clientWidth;
  const box = chart.getBoundingClientRect(), kept = chart.querySelector("circle.k"), scale = box.width / 1000;
  const at = (name) => Number(kept.getAttribute(name)) * scale;
  chart.dispatchEvent(new window_.PointerEvent("pointermove", {clientX: box.left + at("cx"), clientY: box.top + at("cy")}));
  seen.pointed = said.textContent;
  seen.picture = window_.getComputedStyle(page.querySelector("#map-tip .tile")).backgroundImage.slice(0, 20);
  const press = (key) => chart.dispatchEvent(new window_.KeyboardEvent("keydown", {key, cancelable: true}));
  ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].forEach(press);
  seen.walked = said.textContent;
  press("Escape");
  seen.hidden = page.getElementById("map-tip").hidden;
  page.querySelector("[data-mode=class]").click();
  seen.by = chart.dataset.by;
  const only = page.getElementById("map-only");
  only.value = "c3";
  only.dispatchEvent(new window_.Event("change"));
  seen.bright = [...chart.querySelectorAll("circle:not(.dim):not(#map-mark)")].every((one) => one.classList.contains("c3"));
  document.getElementById("seen").textContent = JSON.stringify(seen);
};</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_works_on_a_phone(tmp_path):
    dataset = SampleCIFAR10()
    features = dataset.data.reshape(2000, -1)[:, ::64].astype("float32")
    data = QuantizedDataModule(dataset, encoder=features, num_workers=0, cache_dir=tmp_path / "cache")
    data.prepare_data()
    data.setup("fit")
    page = data.report(tmp_path)
    (tmp_path / "probe.html").write_text(PROBE.replace("PAGE", page.as_uri()))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert seen["fits"]
    assert "kept" in seen["pointed"]
    assert seen["picture"].startswith('url("data:image')
    assert seen["walked"].startswith("position")
    assert seen["hidden"]
    assert seen["by"] == "class"
    assert seen["bright"]
