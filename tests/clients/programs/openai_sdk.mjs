// openai (npm): chat whole and streamed, tools, structured output, Responses, errors.

import OpenAI from "openai";
import { ADAPTER, BASE, QUESTION, V1, answer, check, main } from "./checks.mjs";

const client = new OpenAI({ baseURL: V1, apiKey: "none", maxRetries: 0 });
const ASK = { messages: [{ role: "user", content: QUESTION }], temperature: 0, max_tokens: 200 };
const SCHEMA = {
  type: "object",
  properties: { country: { enum: ["France", "Japan"] }, capital: { enum: ["Paris", "Tokyo"] } },
  required: ["country", "capital"],
  additionalProperties: false,
};

/** The arguments or the content, which has to be what SCHEMA allows. */
function fact(text) {
  const found = JSON.parse(text);
  if (Object.keys(found).join() !== "country,capital") throw new Error(`keys: ${text}`);
  if (!SCHEMA.properties.country.enum.includes(found.country)) throw new Error(`country: ${text}`);
  if (!SCHEMA.properties.capital.enum.includes(found.capital)) throw new Error(`capital: ${text}`);
  return found;
}

check("chat, base and adapter", async () => {
  for (const model of [BASE, ADAPTER])
    answer((await client.chat.completions.create({ model, ...ASK })).choices[0].message.content, model);
});

check("chat, stream with usage", async () => {
  let text = "", usage;
  const more = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ model: ADAPTER, ...ASK, ...more })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  if (!(usage.completion_tokens > 0)) throw new Error(`usage: ${JSON.stringify(usage)}`);
  return answer(text, ADAPTER);
});

check("tools, required, whole and streamed by the SDK's runner", async () => {
  const tools = [{ type: "function", function: { name: "capital_of", parameters: SCHEMA } }];
  const body = { model: BASE, ...ASK, tools, tool_choice: "required" };
  fact((await client.chat.completions.create(body)).choices[0].message.tool_calls[0].function.arguments);
  const final = await client.chat.completions.stream(body).finalChatCompletion();
  return fact(final.choices[0].message.tool_calls[0].function.arguments);
});

check("response_format json_schema", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "fact", strict: true, schema: SCHEMA } };
  return fact((await client.chat.completions.parse({ model: BASE, ...ASK, response_format })).choices[0].message.content);
});

check("responses, whole and streamed", async () => {
  const body = { model: ADAPTER, input: QUESTION, temperature: 0 };
  answer((await client.responses.create(body)).output_text, ADAPTER);
  const final = await client.responses.stream(body).finalResponse();
  return answer(final.output_text, ADAPTER);
});

check("unknown adapter: NotFoundError", async () => {
  try {
    await client.chat.completions.create({ model: "nobody", ...ASK });
  } catch (e) {
    if (e instanceof OpenAI.NotFoundError && e.message.includes("nobody")) return e.message;
    throw e;
  }
  throw new Error("an unknown adapter was served");
});

await main();
