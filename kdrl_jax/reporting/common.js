"use strict";
// What charts and samples share: the data, the theme, and how elements are made. Text that a run
// wrote enters the page as text alone: there is no innerHTML anywhere.

const DATA = JSON.parse(document.getElementById("data").textContent);

function $(id) {
  return document.getElementById(id);
}

// An element with a class and children, which may be strings.
function make(tag, name = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

function option(value, text) {
  const element = make("option", "", text);
  element.value = value;
  return element;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function runColour(index) {
  const all = colour("--runs").split(" ");
  return all[index % all.length];
}

// The page follows the system until somebody chooses.
const THEMES = ["auto", "light", "dark"];
const themeListeners = [];
let theme = "auto";

function applyTheme() {
  const dark = theme === "dark" || (theme === "auto" && darkSystem.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[theme];
  for (const listener of themeListeners) listener();
}

$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  applyTheme();
});
darkSystem.addEventListener("change", applyTheme);
applyTheme();
