// Typesets the formulas that the Markdown extension arithmatex has marked: \(...\) in a line, \[...\] on its own.
for (const element of document.querySelectorAll(".arithmatex")) {
  const source = element.textContent.trim();
  katex.render(source.slice(2, -2), element, { displayMode: source.startsWith("\\["), throwOnError: false });
}
