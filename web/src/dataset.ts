/** The dataset service's calls, typed by the JSON types made from the protos. */
import { callsOf } from "./connect";
import type {
  ListDatasetsRequestJson,
  ListDatasetsResponseJson,
} from "./gen/tdb/dataset/v1/dataset_pb";
import type { GetRecordRequestJson, GetRecordResponseJson } from "./gen/tdb/dataset/v1/read_pb";
import type { SearchRequestJson, SearchResponseJson } from "./gen/tdb/dataset/v1/search_pb";

export const DATASET_SERVICE = "tdb.dataset.v1.DatasetService";

const { unary } = callsOf(DATASET_SERVICE);

export const listDatasets = unary<ListDatasetsRequestJson, ListDatasetsResponseJson>(
  "ListDatasets",
);
export const getRecord = unary<GetRecordRequestJson, GetRecordResponseJson>("GetRecord");
export const search = unary<SearchRequestJson, SearchResponseJson>("Search");
