/** The inference service's calls, typed by the JSON types made from the protos. */
import { callsOf } from "./connect";
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
import type {
  RunRequestJson,
  RunResponseJson,
  StreamActivationsRequestJson,
  StreamActivationsResponseJson,
} from "./gen/tdb/inference/v1/run_pb";
import type { VerifyRequestJson, VerifyResponseJson } from "./gen/tdb/inference/v1/verify_pb";

export const SERVICE = "tdb.inference.v1.InferenceService";

const { unary, streamed } = callsOf(SERVICE);

export const listModels = unary<ListModelsRequestJson, ListModelsResponseJson>("ListModels");
export const getModel = unary<GetModelRequestJson, GetModelResponseJson>("GetModel");
export const getQueue = unary<GetQueueRequestJson, GetQueueResponseJson>("GetQueue");
export const tokenize = unary<TokenizeRequestJson, TokenizeResponseJson>("Tokenize");
export const run = unary<RunRequestJson, RunResponseJson>("Run");
export const streamActivations = streamed<
  StreamActivationsRequestJson,
  StreamActivationsResponseJson
>("StreamActivations");
export const attribute = unary<AttributeRequestJson, AttributeResponseJson>("Attribute");
export const verify = streamed<VerifyRequestJson, VerifyResponseJson>("Verify");
export const generate = streamed<GenerateRequestJson, GenerateResponseJson>("Generate");
export const describeComponent = unary<DescribeComponentRequestJson, DescribeComponentResponseJson>(
  "DescribeComponent",
);
