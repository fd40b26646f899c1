// @anthropic-ai/sdk (npm): messages whole and streamed, tools, token counts, errors.

import Anthropic from "@anthropic-ai/sdk";
import { ADAPTER, BASE, QUESTION, URL, answer, check, main } from "./checks.mjs";

const client = new Anthropic({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const ASK = { max_tokens: 200, temperature: 0, messages: [{ role: "user", content: QUESTION }] };
const COUNTRIES = ["France", "Japan"];
const TOOL = {
  name: "capital_of",
  description: "Look up a capital.",
  input_schema: { type: "object", properties: { country: { enum: COUNTRIES } }, required: ["country"] },
};

/** The one tool call of a message, whose input has to be in bounds. */
function call(message) {
  const [use] = message.content.filter((block) => block.type === "tool_use");
  if (use?.name !== TOOL.name || !COUNTRIES.includes(use.input.country)) throw new Error(JSON.stringify(message.content));
  if (message.stop_reason !== "tool_use") throw new Error(`stop_reason: ${message.stop_reason}`);
  return use.input;
}

check("messages", async () => {
  for (const model of [BASE, ADAPTER]) answer((await client.messages.create({ model, ...ASK })).content[0].text, model);
});

check("messages, stream", async () => {
  const stream = client.messages.stream({ model: ADAPTER, ...ASK });
  let text = "";
  stream.on("text", (delta) => (text += delta));
  const final = await stream.finalMessage();
  if (final.stop_reason !== "end_turn") throw new Error(`stop_reason: ${final.stop_reason}`);
  return answer(text, ADAPTER);
});

check("tool use, whole and streamed", async () => {
  const body = { model: BASE, ...ASK, tools: [TOOL], tool_choice: { type: "tool", name: TOOL.name } };
  call(await client.messages.create(body));
  return call(await client.messages.stream(body).finalMessage());
});

check("count_tokens", async () => {
  const { input_tokens } = await client.messages.countTokens({ model: ADAPTER, messages: ASK.messages });
  if (!(input_tokens > 5)) throw new Error(`input_tokens: ${input_tokens}`);
  return input_tokens;
});

check("unknown adapter: NotFoundError", async () => {
  try {
    await client.messages.create({ model: "nobody", ...ASK });
  } catch (e) {
    if (e instanceof Anthropic.NotFoundError && e.message.includes("nobody")) return e.message;
    throw e;
  }
  throw new Error("an unknown adapter was served");
});

await main();
