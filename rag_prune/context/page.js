"use strict";
{
  const slider = document.getElementById("threshold");
  const shown = document.querySelector("output");
  const tip = document.getElementById("tip");
  const number = new Intl.NumberFormat("en");
  let threshold = null; // null: as cut by the page's writer
  let explained; // the sentence that the tip is about

  // A sentence without a score is out whatever the threshold; one without an element is not shown.
  const sentences = new Map();
  const readSentence = (element) => {
    const { score = -1, size } = element.dataset;
    const sentence = { element, score: Number(score), size: Number(size), why: element.title };
    element.removeAttribute("title"); // or the browser would show its own tip over ours
    sentences.set(element, sentence);
    return sentence;
  };
  const readUnshown = (element) =>
    JSON.parse(element.dataset.unshown).map(([score, size]) => ({ score, size }));
  const readPassage = (element) => ({
    count: element.querySelector(".count"),
    sentences: [
      ...Array.from(element.querySelectorAll(".sentence"), readSentence),
      ...Array.from(element.querySelectorAll("[data-unshown]"), readUnshown).flat(),
    ],
  });
  const questions = Array.from(document.querySelectorAll(".question"), (element) => ({
    tally: element.querySelector(".tally"),
    passages: Array.from(element.querySelectorAll(".passage"), readPassage),
  }));

  function show(tally, kept) {
    const size = Number(tally.dataset.size);
    tally.querySelector(".share").textContent = `${(size ? (100 * kept) / size : 100).toFixed(1)} %`;
    tally.querySelector(".kept-size").textContent = number.format(kept);
  }

  function recut() {
    let keptInAll = 0;
    for (const { tally, passages } of questions) {
      let keptHere = 0;
      for (const { count, sentences } of passages) {
        for (const { element, score } of sentences) {
          element?.classList.toggle("kept", score >= threshold);
        }
        const kept = sentences.filter(({ score }) => score >= threshold);
        keptHere += kept.reduce((sum, { size }) => sum + size, 0);
        if (count) count.textContent = number.format(kept.length);
      }
      show(tally, keptHere);
      keptInAll += keptHere;
    }
    show(document.querySelector(".all .tally"), keptInAll);
  }

  function why({ score, why }) {
    if (threshold === null || score < 0) return why;
    const rounded = Number(score.toPrecision(3)); // which must not contradict the decision
    const stays = score >= threshold;
    const exact = rounded >= threshold === stays ? rounded : score;
    return `score ${exact} ${stays ? "≥" : "<"} threshold ${threshold}`;
  }

  function explain({ target, clientY }) {
    explained?.removeAttribute("aria-describedby");
    explained = target.closest?.("main .sentence");
    tip.hidden = !explained;
    if (!explained) return;
    tip.textContent = why(sentences.get(explained));
    explained.setAttribute("aria-describedby", "tip");
    const lines = [...explained.getClientRects()];
    const line = lines.find(({ top, bottom }) => top <= clientY && clientY <= bottom) ?? lines[0];
    const above = line.top - tip.offsetHeight - 6;
    const roof = document.querySelector(".bar").getBoundingClientRect().bottom;
    tip.style.left = `${Math.max(8, Math.min(line.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${scrollY + (above > roof ? above : line.bottom + 6)}px`;
  }

  const hideTip = () => (tip.hidden = true);

  slider.addEventListener("input", () => {
    // Squared, so that the slider is finer near 0, where most probabilities are.
    threshold = Number((slider.valueAsNumber ** 2).toFixed(4));
    shown.textContent = threshold;
    slider.setAttribute("aria-valuetext", threshold);
    recut();
  });
  slider.setAttribute("aria-valuetext", shown.textContent);
  slider.parentElement.hidden = false;

  addEventListener("pointerover", explain);
  addEventListener("focusin", explain);
  addEventListener("focusout", hideTip);
  addEventListener("keydown", ({ key }) => key === "Escape" && hideTip());
}
