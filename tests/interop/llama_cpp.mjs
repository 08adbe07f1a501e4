// What llama.cpp makes of models: {home, models, ids, count, text} as JSON on standard input; for each model the
// greedy continuation of ids and the ids of text as JSON out.
import {readFileSync} from "node:fs";

const {home, models, ids, count, text} = JSON.parse(readFileSync(0, "utf8"));
const {getLlama} = await import(`${home}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const exact = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const answers = [];
for (const modelPath of models) {
    const model = await llama.loadModel({modelPath});
    const context = await model.createContext({contextSize: 64, threads: 1, ...exact});
    const found = [];
    for await (const token of context.getSequence().evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        found.push(token);
        if (found.length === count) break;
    }
    const first = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    answers.push({continuation: found, text: [...first, ...model.tokenize(text, true)]});
    await model.dispose();
}
console.log(JSON.stringify(answers));
process.exit(0);
