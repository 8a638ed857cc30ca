// Looks up one task, or watches it until it is over. Prints the reply or each state; for an error, its code, message, reason, retry
// delay and request id.

import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import * as grpc from '@grpc/grpc-js';
import * as protoLoader from '@grpc/proto-loader';
import protoFiles from 'google-proto-files';

// The client is generated from the proto at start. In your own project, copy the proto and change this path.
const PROTO_FOLDER = fileURLToPath(new URL('../../../proto', import.meta.url));
const definitions = grpc.loadPackageDefinition(
  protoLoader.loadSync('huaweicloud/rds/task/v1/task_service.proto', {
    includeDirs: [PROTO_FOLDER],
    keepCase: true,
    enums: String,
  }),
);
const { TaskService } = definitions.huaweicloud.rds.task.v1;

// The facade already retries RDS. One retry here covers an instance of the facade that stops during the call.
// [retry]
const SERVICE_CONFIG = {
  methodConfig: [
    {
      name: [{ service: 'huaweicloud.rds.task.v1.TaskService', method: 'GetTaskDetail' }],
      timeout: '30s',
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
  // The word `watch` comes before the options.
  const watches = process.argv[2] === 'watch';
  const { values: options } = parseArgs({
    args: process.argv.slice(watches ? 3 : 2),
    options: {
      target: { type: 'string', default: '127.0.0.1:50051' }, // address of the facade, HOST:PORT
      ca: { type: 'string' }, // PEM file of trusted certificates; plaintext if not set
      token: { type: 'string' }, // RDS token of the caller, needed if the facade runs with --credentials caller
      'project-id': { type: 'string', default: '0483b6b16e954cb88930a360d2c4e663' }, // project that owns the instance
      'instance-id': { type: 'string', default: watches ? 'lifecycle-20' : '1ffc4167903840cb93a3da56d28c14fdin01' }, // database instance
      'workflow-id': { type: 'string', default: '102772a9-31fa-4129-b9f8-7638e2792f3b' }, // task
      timeout: { type: 'string', default: watches ? '3600' : '10' }, // deadline of the call or of the whole watch, in seconds
    },
  });
  const client = openClient(options.target, options.ca);
  try {
    if (watches) {
      process.exitCode = await watch(client, options);
    } else {
      console.log(JSON.stringify(await getTaskDetail(client, options), null, 2));
    }
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
  return new TaskService(target, credentials, {
    'grpc.service_config': JSON.stringify(SERVICE_CONFIG),
    // PINGs detect a lost connection, on which a watch would wait for its deadline.
    'grpc.keepalive_time_ms': 60_000,
    'grpc.keepalive_timeout_ms': 20_000,
  });
}
// [/connection]

// [call]
function getTaskDetail(client, options) {
  const request = {
    project_id: options['project-id'],
    instance_id: options['instance-id'],
    workflow_id: options['workflow-id'],
  };
  const deadline = Date.now() + Number(options.timeout) * 1000;
  return new Promise((resolve, reject) => {
    client.GetTaskDetail(request, metadata(options), { deadline }, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
}

function metadata(options) {
  const metadata = new grpc.Metadata();
  if (options.token) {
    metadata.set('x-auth-token', options.token);
  }
  return metadata;
}
// [/call]

// [watch]
const TRANSIENT = ['UNAVAILABLE', 'RESOURCE_EXHAUSTED', 'ABORTED', 'DEADLINE_EXCEEDED', 'CANCELLED'];

// Returns the exit code: 0 succeeded, 3 failed or canceled, 4 the time is over, 1 the call failed.
async function watch(client, options) {
  const request = {
    project_id: options['project-id'],
    instance_id: options['instance-id'],
    workflow_id: options['workflow-id'],
  };
  const deadline = Date.now() + Number(options.timeout) * 1000;
  let state;
  let pause = 1000;
  for (;;) {
    let delay;
    try {
      for await (const message of client.WatchTaskDetail(request, metadata(options), { deadline })) {
        pause = 1000;
        if (message.task) {
          // The final state comes again if the connection was lost after it.
          if (message.etag !== request.etag) {
            printState(message.task);
          }
          state = message.task.state;
        }
        request.etag = message.etag;
      }
      return state === 'TASK_STATE_SUCCEEDED' ? 0 : 3;
    } catch (error) {
      await printError(error);
      const { reason, retryDelay = 0 } = await errorDetails(error);
      if (!isTransient(error, reason)) {
        return 1;
      }
      delay = Math.max(pause * (0.8 + 0.4 * Math.random()), retryDelay * 1000);
      pause = Math.min(pause * 1.6, 30_000);
    }
    if (delay >= deadline - Date.now()) {
      return 4;
    }
    await sleep(delay);
  }
}

function isTransient(error, reason) {
  const code = grpc.status[error.code];
  // Without a reason, these codes come from a proxy or a lost connection.
  if (code === 'INTERNAL' || code === 'UNKNOWN') {
    return !reason;
  }
  return TRANSIENT.includes(code) && reason !== 'QUOTA_EXHAUSTED';
}

function printState(task) {
  const percent = task.progress_percent === undefined ? '' : ` ${task.progress_percent}%`;
  console.log(`${task.state ?? 'TASK_STATE_UNSPECIFIED'}${percent}`);
}
// [/watch]

// [error]
async function printError(error) {
  const details = await errorDetails(error);
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  if (details.reason) {
    console.error('reason:', details.reason);
  }
  if (details.retryDelay) {
    console.error('retry after:', details.retryDelay, 's');
  }
  if (details.requestId) {
    console.error('request id:', details.requestId);
  }
}

// Returns the reason, retry delay in seconds and request id, as far as the error has them.
async function errorDetails(error) {
  const [encoded] = error.metadata.get('grpc-status-details-bin');
  if (!encoded) {
    return {};
  }
  const root = await protoFiles.load([
    protoFiles.getProtoPath('rpc', 'status.proto'),
    protoFiles.getProtoPath('rpc', 'error_details.proto'),
  ]);
  const found = {};
  for (const { type_url: typeUrl, value } of root.lookupType('google.rpc.Status').decode(encoded).details) {
    const type = typeUrl.slice(typeUrl.lastIndexOf('/') + 1);
    const detail = root.lookupType(type).decode(value);
    if (type === 'google.rpc.ErrorInfo') {
      found.reason = detail.reason;
    } else if (type === 'google.rpc.RetryInfo') {
      found.retryDelay = Number(detail.retryDelay.seconds) + detail.retryDelay.nanos / 1e9;
    } else if (type === 'google.rpc.RequestInfo') {
      found.requestId = detail.requestId;
    }
  }
  return found;
}
// [/error]

await main();
