/** The inference service's calls, typed by the JSON types made from the protos. */
import { call, stream, type CallOptions } from "./connect";
import type {
  AttributeRequestJson,
  AttributeResponseJson,
} from "./gen/tdb/inference/v1/attribute_pb";
import type {
  DescribeComponentRequestJson,
  DescribeComponentResponseJson,
} from "./gen/tdb/inference/v1/component_pb";
import type { GenerateRequestJson, GenerateResponseJson } from "./gen/tdb/inference/v1/generate_pb";
import type {
  GetModelRequestJson,
  GetModelResponseJson,
  ListModelsRequestJson,
  ListModelsResponseJson,
  TokenizeRequestJson,
  TokenizeResponseJson,
} from "./gen/tdb/inference/v1/model_pb";
import type { GetQueueRequestJson, GetQueueResponseJson } from "./gen/tdb/inference/v1/queue_pb";
import type { RunRequestJson, RunResponseJson } from "./gen/tdb/inference/v1/run_pb";
import type { VerifyRequestJson, VerifyResponseJson } from "./gen/tdb/inference/v1/verify_pb";

export const SERVICE = "tdb.inference.v1.InferenceService";

function rpc<Request, Response>(name: string) {
  return (request: Request, options?: CallOptions): Promise<Response> =>
    call<Request, Response>(`${SERVICE}/${name}`, request, options);
}

function streamed<Request, Response>(name: string) {
  return (request: Request, options?: CallOptions): AsyncGenerator<Response, void> =>
    stream<Request, Response>(`${SERVICE}/${name}`, request, options);
}

export const listModels = rpc<ListModelsRequestJson, ListModelsResponseJson>("ListModels");
export const getModel = rpc<GetModelRequestJson, GetModelResponseJson>("GetModel");
export const getQueue = rpc<GetQueueRequestJson, GetQueueResponseJson>("GetQueue");
export const tokenize = rpc<TokenizeRequestJson, TokenizeResponseJson>("Tokenize");
export const run = rpc<RunRequestJson, RunResponseJson>("Run");
export const attribute = rpc<AttributeRequestJson, AttributeResponseJson>("Attribute");
export const verify = streamed<VerifyRequestJson, VerifyResponseJson>("Verify");
export const generate = streamed<GenerateRequestJson, GenerateResponseJson>("Generate");
export const describeComponent = rpc<DescribeComponentRequestJson, DescribeComponentResponseJson>(
  "DescribeComponent",
);
