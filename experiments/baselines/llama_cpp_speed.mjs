// llama.cpp generating greedily from its own file: what decode_speed.py is compared with.
//
//     node llama_cpp_speed.mjs FILE.gguf HOME THREADS
//
// HOME is the folder that holds node_modules/node-llama-cpp. Each line on standard input is {"prompt", "tokens"};
// each is answered by the tokens per second of reading a prompt of so many tokens and of continuing it.
import {createInterface} from "node:readline";

const [modelPath, home, threads] = process.argv.slice(2);
const {getLlama} = await import(`${home}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath});
const exact = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};

for await (const line of createInterface({input: process.stdin})) {
    const {prompt, tokens} = JSON.parse(line);
    const size = {contextSize: prompt + tokens + 8, batchSize: 512};
    const context = await model.createContext({...size, threads: Number(threads), ...exact});
    const ids = Array.from({length: prompt}, (_, i) => 100 + ((i * 7919) % 40000));
    const start = performance.now();
    let read, count = 0;
    for await (const _ of context.getSequence().evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        if (count === 0) read = performance.now();
        if (count++ === tokens) break;
    }
    const done = performance.now();
    await context.dispose();
    console.log(JSON.stringify({prefill: prompt / (read - start) * 1e3, decode: tokens / (done - read) * 1e3}));
}
process.exit(0);
