// Runs each use of the client once and prints one JSON object with what it saw.
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France? Answer in one word." }];
const seen = {};

seen.models = (await client.models.list()).data.map((entry) => entry.id);

const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 20 });
seen.whole = whole.choices[0].message.content;
seen.finish = whole.choices[0].finish_reason;
seen.usage = whole.usage.total_tokens === whole.usage.prompt_tokens + whole.usage.completion_tokens;

const stream = await client.chat.completions.create({
  model, messages, temperature: 0, max_tokens: 20, stream: true, stream_options: { include_usage: true },
});
seen.streamed = "";
for await (const chunk of stream) {
  seen.streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) seen.streamedTokens = chunk.usage.completion_tokens;
}

const runner = client.chat.completions.stream({ model, messages, temperature: 0, max_tokens: 20 });
seen.helper = await runner.finalContent();

const json = await client.chat.completions.create({
  model, messages: [{ role: "user", content: "Name a city and its population as JSON." }], temperature: 0, max_tokens: 120,
  response_format: {
    type: "json_schema",
    json_schema: {
      name: "city", strict: true,
      schema: {
        type: "object", required: ["name", "population"], additionalProperties: false,
        properties: { name: { type: "string", maxLength: 20 }, population: { type: "integer" } },
      },
    },
  },
});
seen.json = json.choices[0].message.content;

const controller = new AbortController();
const aborted = await client.chat.completions.create(
  { model, messages, max_tokens: 500, ignore_eos: true, stream: true }, { signal: controller.signal });
let pieces = 0;
for await (const _ of aborted) if (++pieces === 3) controller.abort();
seen.abortedAfter = pieces;

const failures = {
  key: () => new OpenAI({ baseURL, apiKey: "ak_wrong", maxRetries: 0 }).models.list(),
  model: () => client.chat.completions.create({ model: "no-such-model", messages }),
  field: () => client.chat.completions.create({ model, messages, temperature: 9 }),
};
for (const [name, attempt] of Object.entries(failures)) {
  try {
    await attempt();
    seen[name] = "no error";
  } catch (error) {
    seen[name] = [error.constructor.name, error.status, error.code ?? null, error.param ?? null];
  }
}
console.log(JSON.stringify(seen));
