// AI SDK: text, streams, objects and required tools over chat completions, and its OpenAI provider over Responses.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";
import { ADAPTER, BASE, QUESTION, V1, answer, check, main } from "./checks.mjs";

const chat = createOpenAICompatible({ name: "ours", baseURL: V1, apiKey: "none", supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL: V1, apiKey: "none" });
const ASK = { prompt: QUESTION, temperature: 0, maxRetries: 0 };
const FACT = z.object({ country: z.enum(["France", "Japan"]), capital: z.enum(["Paris", "Tokyo"]) });

check("generateText, base and adapter", async () => {
  for (const model of [BASE, ADAPTER]) answer((await generateText({ model: chat(model), ...ASK })).text, model);
});

check("streamText", async () => {
  let text = "";
  for await (const piece of streamText({ model: chat(ADAPTER), ...ASK }).textStream) text += piece;
  return answer(text, ADAPTER);
});

check("Output.object", async () => {
  const found = await generateText({ model: chat(BASE), output: Output.object({ schema: FACT }), maxOutputTokens: 200, ...ASK });
  return FACT.parse(found.output);
});

check("tools, toolChoice required", async () => {
  const tools = { capital_of: tool({ description: "Look up a capital.", inputSchema: FACT }) };
  const found = await generateText({ model: chat(BASE), tools, toolChoice: "required", maxOutputTokens: 300, ...ASK });
  return FACT.parse(found.toolCalls[0].input);
});

check("OpenAI provider (Responses), whole and streamed", async () => {
  answer((await generateText({ model: openai(ADAPTER), ...ASK })).text, ADAPTER);
  let text = "";
  for await (const piece of streamText({ model: openai(ADAPTER), ...ASK }).textStream) text += piece;
  return answer(text, ADAPTER);
});

await main();
