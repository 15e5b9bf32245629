// Before the first paint: the theme chosen last time. Without a choice the system's holds (style.css).
"use strict";
try {
  const saved = JSON.parse(localStorage.getItem("hasten.theme"));
  if (saved === "light" || saved === "dark") document.documentElement.dataset.theme = saved;
} catch {
  // A browser that forbids storage: the system's theme.
}
