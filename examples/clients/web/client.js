// Looks up one task, or watches it until it is over, as a web page does: with gRPC-Web over fetch, through the Envoy of examples/json.
// Node runs it for CI; in a page, the same code reads its options from the page.

import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { toJson } from '@bufbuild/protobuf';
import { Code, ConnectError, createClient } from '@connectrpc/connect';
import { createGrpcWebTransport } from '@connectrpc/connect-web';

import { ErrorInfoSchema, RequestInfoSchema, RetryInfoSchema } from './gen/google/rpc/error_details_pb.js';
import { GetTaskDetailResponseSchema, TaskService, TaskState } from './gen/huaweicloud/rds/task/v1/task_service_pb.js';

const watches = process.argv[2] === 'watch';
const { values: options } = parseArgs({
  args: process.argv.slice(watches ? 3 : 2),
  options: {
    target: { type: 'string', default: 'http://127.0.0.1:8080' },
    token: { type: 'string' },
    'project-id': { type: 'string', default: '0483b6b16e954cb88930a360d2c4e663' },
    'instance-id': { type: 'string', default: watches ? 'lifecycle-20' : '1ffc4167903840cb93a3da56d28c14fdin01' },
    'workflow-id': { type: 'string', default: '102772a9-31fa-4129-b9f8-7638e2792f3b' },
    timeout: { type: 'string', default: watches ? '3600' : '10' },
  },
});

// [web]
const client = createClient(TaskService, createGrpcWebTransport({ baseUrl: options.target }));
const task = {
  projectId: options['project-id'],
  instanceId: options['instance-id'],
  workflowId: options['workflow-id'],
};
const deadline = Date.now() + Number(options.timeout) * 1000;

function callOptions() {
  return { timeoutMs: deadline - Date.now(), headers: options.token ? { 'x-auth-token': options.token } : {} };
}

async function get() {
  const reply = await client.getTaskDetail(task, callOptions());
  console.log(JSON.stringify(toJson(GetTaskDetailResponseSchema, reply, { useProtoFieldName: true }), null, 2));
  return 0;
}
// [/web]

/** Returns the exit code: 0 succeeded, 3 failed or canceled, 4 the time is over, 1 the call failed. */
async function watch() {
  let state;
  let etag = '';
  let pause = 1000;
  for (;;) {
    try {
      for await (const message of client.watchTaskDetail({ ...task, etag }, callOptions())) {
        pause = 1000;
        if (message.task) {
          // The final state comes again if the connection was lost after it.
          if (message.etag !== etag) {
            console.log(TaskState[message.task.state], message.task.progressPercent ?? '');
          }
          state = message.task.state;
        }
        etag = message.etag;
      }
      return state === TaskState.SUCCEEDED ? 0 : 3;
    } catch (caught) {
      const error = ConnectError.from(caught);
      printError(error);
      if (!isTransient(error)) {
        return 1;
      }
      const delay = Math.max(pause * (0.8 + 0.4 * Math.random()), retryDelay(error));
      pause = Math.min(pause * 1.6, 30_000);
      if (Date.now() + delay >= deadline) {
        return 4;
      }
      await sleep(delay);
    }
  }
}

const TRANSIENT = [Code.Unavailable, Code.ResourceExhausted, Code.Aborted, Code.DeadlineExceeded, Code.Canceled];

function isTransient(error) {
  const [info] = error.findDetails(ErrorInfoSchema);
  // Without a reason, these codes come from a proxy or a lost connection.
  if (error.code === Code.Internal || error.code === Code.Unknown) {
    return !info;
  }
  return TRANSIENT.includes(error.code) && info?.reason !== 'QUOTA_EXHAUSTED';
}

function printError(error) {
  console.error(`${Code[error.code]}: ${error.rawMessage}`);
  for (const { reason } of error.findDetails(ErrorInfoSchema)) {
    console.error('reason:', reason);
  }
  if (retryDelay(error)) {
    console.error('retry after:', retryDelay(error) / 1000, 's');
  }
  for (const { requestId } of error.findDetails(RequestInfoSchema)) {
    console.error('request id:', requestId);
  }
}

/** The delay of RetryInfo in milliseconds; 0 if the error has none. */
function retryDelay(error) {
  const [info] = error.findDetails(RetryInfoSchema);
  return info ? Number(info.retryDelay.seconds) * 1000 + info.retryDelay.nanos / 1e6 : 0;
}

try {
  process.exitCode = await (watches ? watch() : get());
} catch (error) {
  printError(ConnectError.from(error));
  process.exitCode = 1;
}
