// Lets llama.cpp read GGUF files on the CPU: node answer.mjs JOB.json, which names the files and what each is asked.
import fs from "node:fs";
import { pathToFileURL } from "node:url";

const job = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(`${job.packages}/node-llama-cpp/dist/index.js`).href);
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error });

// Probabilities of the next token after each, fp32, row after row.
async function readProbabilities(sequence, ids) {
  await sequence.clearHistory();
  const found = await sequence.controlledEvaluate(ids.map((id) => [id, { generateNext: { probabilities: true } }]));
  const size = job.num_tokens;
  const values = new Float32Array(found.length * size);
  found.forEach(({ next }, row) => next.probabilities.forEach((value, id) => (values[row * size + id] = value)));
  return Buffer.from(values.buffer).toString("base64");
}

// The most probable tokens one after another, until one that ends a generation, which is not among them.
async function answer(sequence, ids, most) {
  await sequence.clearHistory();
  const found = [];
  let ended = true;
  for await (const id of sequence.evaluate(ids, { temperature: 0 })) {
    found.push(id);
    if (found.length === most) {
      ended = false;
      break;
    }
  }
  return { tokens: found, ended };
}

async function ask({ model: modelPath, texts, probabilities, prompts, most }) {
  const model = await llama.loadModel({ modelPath, gpuLayers: 0 });
  const context = await model.createContext({ contextSize: 512, batchSize: 512, threads: 1 });
  const sequence = context.getSequence();
  const result = { tokens: texts.map((text) => model.tokenize(text, true)), probabilities: [], answers: [], ends: [] };
  for (const ids of probabilities) result.probabilities.push(await readProbabilities(sequence, ids));
  for (const ids of prompts) result.answers.push(await answer(sequence, ids, most));
  for (let id = 0; id < job.num_tokens; id++) if (model.isEogToken(id)) result.ends.push(id);
  await context.dispose();
  await model.dispose();
  return result;
}

const answers = [];
for (const question of job.files) answers.push(await ask(question));
fs.writeFileSync(job.output, JSON.stringify(answers));
process.exit(0);
