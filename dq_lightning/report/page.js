"use strict";
(() => {
  const chart = document.getElementById("map-chart");
  if (!chart) return;
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const circles = [...chart.querySelectorAll("circle:not(#map-mark)")];
  const places = circles.map((one) => [Number(one.getAttribute("cx")), Number(one.getAttribute("cy"))]);
  const mark = document.getElementById("map-mark");
  const tip = document.getElementById("map-tip");
  const tile = tip.querySelector(".tile");
  const words = tip.querySelector("p");
  const said = document.getElementById("map-said");
  const only = document.getElementById("map-only");
  let current = -1;

  const isShown = (number) => !circles[number].classList.contains("dim");

  const describe = (number) => {
    const [position, state, bin, group, , name, text] = data.points[number];
    const lines = [`position ${position.toLocaleString("en")}`, state];
    if (group != null && data.classes[group] !== undefined) lines.splice(1, 0, data.classes[group]);
    if (bin != null) lines.push(`bin ${bin}`);
    return [lines.join(" · "), name, text].filter(Boolean).join("\n");
  };

  const show = (number) => {
    current = number;
    const [x, y] = places[number];
    const picture = data.points[number][4];
    mark.setAttribute("cx", x);
    mark.setAttribute("cy", y);
    mark.style.display = "inline";
    tile.hidden = picture == null;
    tile.style.display = picture == null ? "none" : "";
    if (picture != null) {
      const side = -3 * data.tile;
      tile.style.backgroundPosition = `${(picture % data.columns) * side}px ${Math.floor(picture / data.columns) * side}px`;
    }
    words.textContent = said.textContent = describe(number);
    tip.hidden = false;
    const box = chart.getBoundingClientRect();
    const scale = box.width / chart.viewBox.baseVal.width;
    const left = x * scale + 14;
    const top = y * scale + 14;
    tip.style.left = `${Math.max(0, left + tip.offsetWidth > box.width ? x * scale - tip.offsetWidth - 14 : left)}px`;
    tip.style.top = `${Math.max(0, top + tip.offsetHeight > box.height ? y * scale - tip.offsetHeight - 14 : top)}px`;
  };

  const hide = () => {
    current = -1;
    tip.hidden = true;
    mark.style.display = "none";
  };

  const nearest = (x, y, allowed) => {
    let best = -1;
    let least = Infinity;
    places.forEach(([a, b], number) => {
      if (!isShown(number)) return;
      const distance = allowed(a - x, b - y, number);
      if (distance !== null && distance < least) {
        least = distance;
        best = number;
      }
    });
    return best;
  };

  const byPointer = (event) => {
    const box = chart.getBoundingClientRect();
    const scale = chart.viewBox.baseVal.width / box.width;
    const reach = 24 * scale;
    const found = nearest((event.clientX - box.left) * scale, (event.clientY - box.top) * scale, (dx, dy) =>
      dx * dx + dy * dy <= reach * reach ? dx * dx + dy * dy : null);
    if (found < 0) hide();
    else if (found !== current) show(found);
  };
  chart.addEventListener("pointermove", byPointer);
  chart.addEventListener("pointerdown", byPointer);
  chart.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  chart.addEventListener("focus", () => {
    if (chart.matches(":focus-visible") && current < 0) show(nearest(500, 320, (dx, dy) => dx * dx + dy * dy));
  });
  chart.addEventListener("blur", hide);

  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  chart.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const way = ways[event.key];
    if (!way) return;
    event.preventDefault();
    const [x, y] = current < 0 ? [500, 320] : places[current];
    const found = nearest(x, y, (dx, dy, number) => {
      const ahead = dx * way[0] + dy * way[1];
      const aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
      return number !== current && ahead > 0 && aside <= 2 * ahead ? ahead + 2 * aside : null;
    });
    if (found >= 0) show(found);
  });

  document.querySelectorAll("[data-mode]").forEach((button) => {
    button.addEventListener("click", () => {
      const mode = button.dataset.mode;
      chart.dataset.by = mode;
      document.querySelectorAll("[data-mode]").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
      document.querySelectorAll(".legend[data-of]").forEach((one) => { one.hidden = one.dataset.of !== mode; });
    });
  });
  only.addEventListener("change", () => {
    hide();
    circles.forEach((one) => one.classList.toggle("dim", only.value !== "" && !one.classList.contains(only.value)));
  });
})();
