/** The explainer service's calls, typed by the JSON types made from the protos. */
import { callsOf } from "./connect";
import type {
  EstimateCostRequestJson,
  EstimateCostResponseJson,
  ExplainManyRequestJson,
  ExplainRequestJson,
  ExplainResponseJson,
  ScoreRequestJson,
  ScoreResponseJson,
} from "./gen/tdb/explainer/v1/explain_pb";
import type {
  DeleteExplanationRequestJson,
  DeleteExplanationResponseJson,
  ListExplanationsRequestJson,
  ListExplanationsResponseJson,
  RateExplanationRequestJson,
  RateExplanationResponseJson,
  WriteExplanationRequestJson,
  WriteExplanationResponseJson,
} from "./gen/tdb/explainer/v1/explanation_pb";
import type {
  CancelJobRequestJson,
  CancelJobResponseJson,
  ExplainManyResponseJson,
  FollowJobRequestJson,
  FollowJobResponseJson,
  ListJobsRequestJson,
  ListJobsResponseJson,
  PauseJobRequestJson,
  PauseJobResponseJson,
  ResumeJobRequestJson,
  ResumeJobResponseJson,
} from "./gen/tdb/explainer/v1/job_pb";
import type {
  EmbedExplanationsRequestJson,
  EmbedExplanationsResponseJson,
  ImportExplanationsRequestJson,
  ImportExplanationsResponseJson,
  SearchRequestJson,
  SearchResponseJson,
} from "./gen/tdb/explainer/v1/search_pb";
import type {
  GetCapabilitiesRequestJson,
  GetCapabilitiesResponseJson,
} from "./gen/tdb/explainer/v1/service_pb";

export const EXPLAINER_SERVICE = "tdb.explainer.v1.ExplainerService";

const { unary, streamed } = callsOf(EXPLAINER_SERVICE);

export const getCapabilities = unary<GetCapabilitiesRequestJson, GetCapabilitiesResponseJson>(
  "GetCapabilities",
);
export const listExplanations = unary<ListExplanationsRequestJson, ListExplanationsResponseJson>(
  "ListExplanations",
);
export const writeExplanation = unary<WriteExplanationRequestJson, WriteExplanationResponseJson>(
  "WriteExplanation",
);
export const rateExplanation = unary<RateExplanationRequestJson, RateExplanationResponseJson>(
  "RateExplanation",
);
export const deleteExplanation = unary<DeleteExplanationRequestJson, DeleteExplanationResponseJson>(
  "DeleteExplanation",
);
export const explain = streamed<ExplainRequestJson, ExplainResponseJson>("Explain");
export const score = streamed<ScoreRequestJson, ScoreResponseJson>("Score");
export const estimateCost = unary<EstimateCostRequestJson, EstimateCostResponseJson>(
  "EstimateCost",
);
export const explainMany = streamed<ExplainManyRequestJson, ExplainManyResponseJson>("ExplainMany");
export const listJobs = unary<ListJobsRequestJson, ListJobsResponseJson>("ListJobs");
export const followJob = streamed<FollowJobRequestJson, FollowJobResponseJson>("FollowJob");
export const pauseJob = unary<PauseJobRequestJson, PauseJobResponseJson>("PauseJob");
export const resumeJob = unary<ResumeJobRequestJson, ResumeJobResponseJson>("ResumeJob");
export const cancelJob = unary<CancelJobRequestJson, CancelJobResponseJson>("CancelJob");
export const embedExplanations = streamed<
  EmbedExplanationsRequestJson,
  EmbedExplanationsResponseJson
>("EmbedExplanations");
export const searchExplanations = unary<SearchRequestJson, SearchResponseJson>("Search");
export const importExplanations = streamed<
  ImportExplanationsRequestJson,
  ImportExplanationsResponseJson
>("ImportExplanations");
