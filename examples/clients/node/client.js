// Looks up one task. Prints the reply or, if the call fails, its code, message, reason, retry delay and request id.

import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import * as grpc from '@grpc/grpc-js';
import * as protoLoader from '@grpc/proto-loader';
import protoFiles from 'google-proto-files';

// The client is generated from the proto at start. In your own project, copy the proto and change this path.
const PROTO_FOLDER = fileURLToPath(new URL('../../../proto', import.meta.url));
const definitions = grpc.loadPackageDefinition(
  protoLoader.loadSync('huaweicloud/rds/task/v1/task_service.proto', { includeDirs: [PROTO_FOLDER], keepCase: true }),
);
const { TaskService } = definitions.huaweicloud.rds.task.v1;

// The facade already retries RDS. One retry here covers an instance of the facade that stops during the call.
// [retry]
const SERVICE_CONFIG = {
  methodConfig: [
    {
      name: [{ service: 'huaweicloud.rds.task.v1.TaskService', method: 'GetTaskDetail' }],
      retryPolicy: {
        maxAttempts: 2,
        initialBackoff: '0.2s',
        maxBackoff: '2s',
        backoffMultiplier: 2,
        retryableStatusCodes: ['UNAVAILABLE'],
      },
    },
  ],
};
// [/retry]

async function main() {
  const { values: options } = parseArgs({
    options: {
      target: { type: 'string', default: '127.0.0.1:50051' }, // address of the facade, HOST:PORT
      ca: { type: 'string' }, // PEM file of trusted certificates; plaintext if not set
      token: { type: 'string' }, // RDS token of the caller, needed if the facade runs with --credentials caller
      'project-id': { type: 'string', default: '0483b6b16e954cb88930a360d2c4e663' }, // project that owns the instance
      'instance-id': { type: 'string', default: '1ffc4167903840cb93a3da56d28c14fdin01' }, // database instance
      'workflow-id': { type: 'string', default: '102772a9-31fa-4129-b9f8-7638e2792f3b' }, // task
      timeout: { type: 'string', default: '10' }, // deadline of the call, in seconds
    },
  });
  const client = openClient(options.target, options.ca);
  try {
    console.log(JSON.stringify(await getTaskDetail(client, options), null, 2));
  } catch (error) {
    await printError(error);
    process.exitCode = 1;
  } finally {
    client.close();
  }
}

// [connection]
function openClient(target, ca) {
  const credentials = ca
    ? grpc.credentials.createSsl(readFileSync(ca))
    : grpc.credentials.createInsecure();
  return new TaskService(target, credentials, { 'grpc.service_config': JSON.stringify(SERVICE_CONFIG) });
}
// [/connection]

// [call]
function getTaskDetail(client, options) {
  const request = {
    project_id: options['project-id'],
    instance_id: options['instance-id'],
    workflow_id: options['workflow-id'],
  };
  const metadata = new grpc.Metadata();
  if (options.token) {
    metadata.set('x-auth-token', options.token);
  }
  const deadline = Date.now() + Number(options.timeout) * 1000;
  return new Promise((resolve, reject) => {
    client.GetTaskDetail(request, metadata, { deadline }, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
}
// [/call]

// [error]
async function printError(error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  const [encoded] = error.metadata.get('grpc-status-details-bin');
  if (!encoded) {
    return;
  }
  const root = await protoFiles.load([
    protoFiles.getProtoPath('rpc', 'status.proto'),
    protoFiles.getProtoPath('rpc', 'error_details.proto'),
  ]);
  for (const { type_url: typeUrl, value } of root.lookupType('google.rpc.Status').decode(encoded).details) {
    const type = typeUrl.slice(typeUrl.lastIndexOf('/') + 1);
    const detail = root.lookupType(type).decode(value);
    if (type === 'google.rpc.ErrorInfo') {
      console.error('reason:', detail.reason);
    } else if (type === 'google.rpc.RetryInfo') {
      console.error('retry after:', Number(detail.retryDelay.seconds) + detail.retryDelay.nanos / 1e9, 's');
    } else if (type === 'google.rpc.RequestInfo') {
      console.error('request id:', detail.requestId);
    }
  }
}
// [/error]

await main();
