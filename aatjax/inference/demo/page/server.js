// Answers from `aatjax demo` on this machine.

async function ask(path, body) {
  const answer = await fetch(path, {
    method: "POST", body, headers: { "Content-Type": "application/octet-stream" },
  });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

export async function open() {
  return {
    window: (samples) => ask("hear", samples),
    file: (file) => ask("file", file),
  };
}
