/** The inference service's calls, typed by the JSON types made from the protos. */
import { call, type CallOptions } from "./connect";
import type {
  AttributeRequestJson,
  AttributeResponseJson,
} from "./gen/tdb/inference/v1/attribute_pb";
import type {
  GetModelRequestJson,
  GetModelResponseJson,
  ListModelsRequestJson,
  ListModelsResponseJson,
  TokenizeRequestJson,
  TokenizeResponseJson,
} from "./gen/tdb/inference/v1/model_pb";
import type { RunRequestJson, RunResponseJson } from "./gen/tdb/inference/v1/run_pb";

export const SERVICE = "tdb.inference.v1.InferenceService";

function rpc<Request, Response>(name: string) {
  return (request: Request, options?: CallOptions): Promise<Response> =>
    call<Request, Response>(`${SERVICE}/${name}`, request, options);
}

export const listModels = rpc<ListModelsRequestJson, ListModelsResponseJson>("ListModels");
export const getModel = rpc<GetModelRequestJson, GetModelResponseJson>("GetModel");
export const tokenize = rpc<TokenizeRequestJson, TokenizeResponseJson>("Tokenize");
export const run = rpc<RunRequestJson, RunResponseJson>("Run");
export const attribute = rpc<AttributeRequestJson, AttributeResponseJson>("Attribute");
