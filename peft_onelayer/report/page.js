"use strict";
const tip = document.getElementById("tip");
function show(event) {
  const mark = event.target.closest(".tip");
  if (!mark) { tip.hidden = true; return; }
  const box = mark.getBoundingClientRect();
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(box.right + 6, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(4, box.top - tip.offsetHeight - 6) + "px";
}
for (const mark of document.querySelectorAll(".tip")) {
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", mark.dataset.tip);
}
document.addEventListener("mouseover", show);
document.addEventListener("focusin", show);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
