() => {
  // The Enter that ends a choice of an input method is not one that sends.
  window.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.isComposing || event.keyCode === 229)) event.stopImmediatePropagation();
  }, true);
  // On a phone the sidebar begins closed.
  if (window.innerWidth < 768) document.querySelector(".sidebar .toggle-button")?.click();
}
