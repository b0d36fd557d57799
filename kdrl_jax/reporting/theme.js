"use strict";
// Before anything is painted: the system's choice of light or dark.
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = darkSystem.matches ? "dark" : "light";
