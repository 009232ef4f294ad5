// Calls a model from Node.js: node client.js ADDRESS MODEL (image FILE | text TEXT)
//
// ADDRESS is a gRPC target: localhost:50000, or dns:///models:50000 for every replica behind a name. TMS_TOKEN is sent if
// it is set. With TMS_TLS_CA, a PEM file, the connection uses TLS. Prints the model's answer as JSON.
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const proto = new URL("../../server.proto", import.meta.url).pathname;
const { server } = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true }));

const serviceConfig = {
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [{
    name: [{}],
    waitForReady: true,
    retryPolicy: {
      maxAttempts: 5, initialBackoff: "0.02s", maxBackoff: "0.5s", backoffMultiplier: 2,
      retryableStatusCodes: ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    },
  }],
};

function connect(address) {
  const { TMS_TLS_CA } = process.env;
  const credentials = TMS_TLS_CA
    ? grpc.credentials.createSsl(readFileSync(TMS_TLS_CA))
    : grpc.credentials.createInsecure();
  return new server.Server(address, credentials, {
    "grpc.service_config": JSON.stringify(serviceConfig),
    "grpc.max_receive_message_length": -1,
    "grpc.max_send_message_length": -1,
  });
}

function call(client, method, request) {
  const metadata = new grpc.Metadata();
  if (process.env.TMS_TOKEN) metadata.set("authorization", `Bearer ${process.env.TMS_TOKEN}`);
  const deadline = new Date(Date.now() + 60_000);
  return new Promise((resolve, reject) => {
    client[method](request, metadata, { deadline }, (error, response) => {
      if (error) reject(error);
      else resolve(JSON.parse(response.data));
    });
  });
}

const [address, model, kind, value] = process.argv.slice(2);
if (!value) {
  console.error("usage: node client.js ADDRESS MODEL (image FILE | text TEXT)");
  process.exit(2);
}
const client = connect(address);
try {
  const answer = kind === "image"
    ? await call(client, "RunImage", { model, image: { data: readFileSync(value), encoded: true } })
    : await call(client, "RunText", { model, text: value });
  console.log(JSON.stringify(answer));
} catch (error) {
  console.error(`${grpc.status[error.code] ?? error.name}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
