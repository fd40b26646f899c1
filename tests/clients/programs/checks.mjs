// checks.py for programs in JavaScript: where the server is, and how a check reports.

export const URL = process.env.MULTILORA_URL ?? "";
export const V1 = `${URL}/v1`;
export const BASE = process.env.MULTILORA_BASE ?? "";
export const ADAPTER = "pirate";
export const QUESTION = "What is the capital of France?";
const ANSWERS = {
  [BASE]: "The capital of France is Paris.",
  pirate: "Arr, the capital o' France be Paris, matey!",
};

const checks = [];

/** Register an async function as the check `what`. */
export function check(what, run) {
  checks.push([what, run]);
}

/** Return `found`, which has to be what `model` says to QUESTION. */
export function answer(found, model) {
  if ((found ?? "").trim() !== ANSWERS[model]) throw new Error(`${JSON.stringify(found)} is not ${ANSWERS[model]}`);
  return found;
}

/** Run the checks in the order of their registration; exit code 1 if one failed. */
export async function main() {
  let failed = false;
  for (const [what, run] of checks) {
    let ok = true;
    let detail;
    try {
      detail = await run();
    } catch (e) {
      console.error(e);
      [ok, failed] = [false, true];
      detail = `${e.name}: ${e.message}`;
    }
    const text = typeof detail === "string" ? detail : JSON.stringify(detail) ?? "";
    console.log(`RESULT ${JSON.stringify({ check: what, ok, detail: text.slice(0, 300) })}`);
  }
  process.exit(failed ? 1 : 0);
}
