package httpapi_test

import (
	"encoding/json"
	"net/http/httptest"
	"reflect"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// object is any JSON object.
type object = map[string]any

func openAPI(t *testing.T) object {
	t.Helper()
	s := newService(t, nil)
	r := s.send(httptest.NewRequest("GET", "/openapi.json", nil))
	return into[object](t, r)
}

// at walks into nested objects.
func at(t *testing.T, v any, names ...string) any {
	t.Helper()
	for i, name := range names {
		o, ok := v.(object)
		if !ok || o[name] == nil {
			t.Fatalf("no %s in %v", strings.Join(names[:i+1], " "), v)
		}
		v = o[name]
	}
	return v
}

func keys(v any) []string {
	var out []string
	for k := range v.(object) {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// operations of the document, and the problems that each can answer.
var operations = map[string]string{
	"get /v1/vault":                                    "busy internal invalid-request store-unavailable token-unavailable",
	"get /v1/relay/keys":                               "internal invalid-request store-unavailable token-unavailable",
	"post /v1/relay":                                   "busy internal invalid-request store-unavailable token-unavailable unauthenticated rate-limited " + body + api.OHTTPKey,
	"get /v1/users/{user}/backup-key":                  common + "not-enrolled",
	"post /v1/users/{user}/backup-key/enrolment":       common + body + "relay-required",
	"put /v1/users/{user}/backup-key":                  common + body + "relay-required conflict",
	"post /v1/users/{user}/backup-key/activation":      common + body + "relay-required not-enrolled conflict key-destroyed",
	"post /v1/users/{user}/backup-key/recovery":        common + body + "not-enrolled conflict key-destroyed too-early",
	"post /v1/users/{user}/backup-key/recovery/finish": common + body + "not-enrolled wrong-password conflict key-destroyed",
	"delete /v1/users/{user}/backup-key":               common + "not-enrolled conflict",
	"post /v1/users/{user}/backup-key/reinstatement":   common + body + "not-enrolled conflict key-destroyed",
}

// rawAnswers are the media types of answers that are not JSON.
var rawAnswers = map[string]string{"/v1/relay/keys": "application/ohttp-keys", "/v1/relay": "message/ohttp-res"}

const (
	common = "invalid-request unauthenticated forbidden rate-limited internal token-unavailable store-unavailable busy account-fault "
	body   = "too-large media-type "
)

func TestDocumentHasEveryOperation(t *testing.T) {
	doc := openAPI(t)
	if at(t, doc, "openapi") != "3.1.0" || at(t, doc, "info", "title") == "" || at(t, doc, "info", "version") == "" {
		t.Errorf("openapi %v, info %v", doc["openapi"], doc["info"])
	}
	ids, found := map[string]bool{}, 0
	for path, item := range at(t, doc, "paths").(object) {
		for method, op := range item.(object) {
			found++
			want, ok := operations[method+" "+path]
			if !ok {
				t.Errorf("unexpected %s %s", method, path)
				continue
			}
			id := at(t, op, "operationId").(string)
			if ids[id] || at(t, op, "summary") == "" {
				t.Errorf("%s: its id is taken, or it has no summary", id)
			}
			ids[id] = true
			if mediaType := rawAnswers[path]; mediaType != "" {
				at(t, op, "responses", "200", "content", mediaType, "schema", "contentEncoding")
			} else {
				at(t, op, "responses", "200", "content", "application/json", "schema", "$ref")
			}
			var kinds []string
			for status, response := range at(t, op, "responses").(object) {
				if at(t, response, "description") == "" {
					t.Errorf("%s %s: no description", id, status)
				}
				if status == "200" {
					continue
				}
				all := at(t, response, "content", api.ProblemMediaType, "schema", "allOf").([]any)
				if at(t, all[0], "$ref") != "#/components/schemas/Problem" {
					t.Errorf("%s %s: not a problem: %v", id, status, all)
				}
				for _, kind := range at(t, all[1], "properties", "type", "enum").([]any) {
					kinds = append(kinds, strings.TrimPrefix(kind.(string), api.ProblemPrefix))
					if problemStatus[kind.(string)] == 0 || status != itoa(problemStatus[kind.(string)]) {
						t.Errorf("%s: %s with status %s", id, kind, status)
					}
				}
				_, retry := response.(object)["headers"].(object)["Retry-After"]
				if retry != (status == "429" || status == "503") {
					t.Errorf("%s %s: Retry-After is documented: %v", id, status, retry)
				}
			}
			wanted := strings.Fields(want)
			sort.Strings(wanted)
			sort.Strings(kinds)
			if !slices.Equal(kinds, wanted) {
				t.Errorf("%s: problems are\n%v, want\n%v", id, kinds, wanted)
			}
			_, hasBody := op.(object)["requestBody"]
			if hasBody != (method == "post" || method == "put") {
				t.Errorf("%s: request body: %v", id, hasBody)
			}
			if hasBody && at(t, op, "requestBody", "required") != true {
				t.Errorf("%s: the body is not required", id)
			}
			security := at(t, op, "security").([]any)
			if public := path == "/v1/vault" || path == "/v1/relay/keys"; public != (len(security) == 0) {
				t.Errorf("%s: security %v", id, security)
			}
			var params []string
			if op.(object)["parameters"] != nil {
				for _, p := range op.(object)["parameters"].([]any) {
					params = append(params, at(t, p, "in").(string)+" "+at(t, p, "name").(string))
				}
			}
			wantParams := []string{"path user"}
			switch {
			case !strings.Contains(path, "{user}"):
				wantParams = nil
			case method == "delete":
				wantParams = append(wantParams, "query generation", "query signature")
			}
			if !slices.Equal(params, wantParams) {
				t.Errorf("%s: parameters %v", id, params)
			}
		}
	}
	if found != len(operations) {
		t.Errorf("%d operations, want %d", found, len(operations))
	}
	if at(t, doc, "components", "securitySchemes", "tenant", "scheme") != "bearer" {
		t.Error("no bearer scheme")
	}
	// Every problem type is there: on an operation, or for paths and methods in the introduction.
	text, err := json.Marshal(doc)
	must(t, err)
	for kind := range problemStatus {
		if !strings.Contains(string(text), `"`+kind+`"`) && !strings.Contains(at(t, doc, "info", "description").(string), kind) {
			t.Errorf("%s is nowhere in the document", kind)
		}
	}
}

// TestReferences: each reference leads somewhere, and each schema is referred to.
func TestReferences(t *testing.T) {
	doc := openAPI(t)
	schemas := at(t, doc, "components", "schemas").(object)
	used := map[string]bool{}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case object:
			if ref, ok := v["$ref"].(string); ok {
				name, local := strings.CutPrefix(ref, "#/components/schemas/")
				if !local || schemas[name] == nil {
					t.Errorf("%s leads nowhere", ref)
				}
				used[name] = true
			}
			for _, x := range v {
				walk(x)
			}
		case []any:
			for _, x := range v {
				walk(x)
			}
		}
	}
	walk(doc)
	for name := range schemas {
		if !used[name] {
			t.Errorf("schema %s is not used", name)
		}
	}
}

// TestSchemas compares each schema with its Go type, member by member.
func TestSchemas(t *testing.T) {
	doc := openAPI(t)
	schemas := at(t, doc, "components", "schemas").(object)
	types := []any{
		api.Vault{}, api.Lifetimes{}, api.KeyList{}, api.Key{}, api.KSF{}, api.StartEnrolmentRequest{}, api.StartEnrolmentResponse{},
		api.StageRequest{}, api.StageResponse{}, api.ActivateRequest{}, api.StartRecoveryRequest{}, api.StartRecoveryResponse{},
		api.FinishRecoveryRequest{}, api.FinishRecoveryResponse{}, api.ReinstateRequest{}, api.Status{}, api.Generation{}, api.Problem{},
	}
	if len(schemas) != len(types) {
		t.Errorf("%d schemas, want %d: %v", len(schemas), len(types), keys(schemas))
	}
	// What the vault is sent is closed; what it answers can grow.
	closed := []string{"KSF", "StartEnrolmentRequest", "StageRequest", "ActivateRequest", "StartRecoveryRequest", "FinishRecoveryRequest", "ReinstateRequest"}
	for _, v := range types {
		typ := reflect.TypeOf(v)
		schema := at(t, schemas, typ.Name()).(object)
		additional, isClosed := schema["additionalProperties"]
		if isClosed != slices.Contains(closed, typ.Name()) || isClosed && additional != false {
			t.Errorf("%s: additionalProperties is %v", typ.Name(), additional)
		}
		var names, required []string
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, option, _ := strings.Cut(f.Tag.Get("json"), ",")
			names = append(names, name)
			if option != "omitempty" {
				required = append(required, name)
			}
			property := at(t, schema, "properties", name).(object)
			checkType(t, typ.Name()+"."+name, f.Type, property)
		}
		sort.Strings(names)
		if got := keys(schema["properties"]); !slices.Equal(got, names) {
			t.Errorf("%s: properties %v, want %v", typ.Name(), got, names)
		}
		var got []string
		for _, r := range schema["required"].([]any) {
			got = append(got, r.(string))
		}
		sort.Strings(got)
		sort.Strings(required)
		if !slices.Equal(got, required) {
			t.Errorf("%s: required %v, want %v", typ.Name(), got, required)
		}
	}
}

func checkType(t *testing.T, name string, typ reflect.Type, p object) {
	t.Helper()
	if typ.Kind() == reflect.Pointer {
		typ = typ.Elem() // absent if nil, and never null
	}
	want := object{}
	switch typ {
	case reflect.TypeFor[api.Bytes]():
		want = object{"type": "string", "contentEncoding": "base64url", "pattern": "^[A-Za-z0-9_-]*$"}
	case reflect.TypeFor[api.GenerationID]():
		want = object{"type": "string", "pattern": "^[0-9a-f]{32}$"}
	case reflect.TypeFor[uint32]():
		want = object{"type": "integer", "minimum": 0.0, "maximum": 4294967295.0}
	default:
		switch typ.Kind() {
		case reflect.String:
			want = object{"type": "string"}
		case reflect.Int, reflect.Int64, reflect.Uint64:
			want = object{"type": "integer"}
		case reflect.Slice:
			want = object{"type": "array"}
		case reflect.Struct:
			if typ.Name() == "Time" {
				want = object{"type": "string", "format": "date-time"}
			} else {
				want = object{"$ref": "#/components/schemas/" + typ.Name()}
			}
		}
	}
	for key, value := range want {
		if !reflect.DeepEqual(p[key], value) {
			t.Errorf("%s: %s is %v, want %v", name, key, p[key], value)
		}
	}
}

// TestLengths compares the lengths in the document with the sizes in the code.
func TestLengths(t *testing.T) {
	doc := openAPI(t)
	sizes := map[string]int{
		"StartEnrolmentRequest registration_request":   opaque.RegistrationRequestSize,
		"StartEnrolmentResponse registration_response": opaque.RegistrationResponseSize,
		"StageRequest record":                          opaque.RecordSize,
		"StageRequest wrapped_key":                     transcript.WrappedKeySize,
		"StageRequest owner_key":                       32,
		"StageResponse digest":                         transcript.DigestSize,
		"ActivateRequest signature":                    64,
		"ActivateRequest previous_signature":           64,
		"StartRecoveryRequest ke1":                     opaque.KE1Size,
		"StartRecoveryResponse ke2":                    opaque.KE2Size,
		"FinishRecoveryRequest ke3":                    opaque.KE3Size,
		"FinishRecoveryResponse sealed_key":            transcript.DeliverySize,
		"ReinstateRequest signature":                   64,
		"Generation digest":                            transcript.DigestSize,
		"Vault identity_key":                           opaque.ElementSize,
		"KeyList signature":                            64,
	}
	for name, schema := range at(t, doc, "components", "schemas").(object) {
		for member, p := range schema.(object)["properties"].(object) {
			p := p.(object)
			if p["contentEncoding"] == nil {
				continue
			}
			size, fixed := sizes[name+" "+member]
			chars := float64((size*8 + 5) / 6)
			if fixed != (p["minLength"] != nil) || fixed && (p["minLength"] != chars || p["maxLength"] != chars) {
				t.Errorf("%s %s: %v to %v characters, want %v", name, member, p["minLength"], p["maxLength"], chars)
			}
			delete(sizes, name+" "+member)
		}
	}
	if len(sizes) != 0 {
		t.Errorf("not in the document: %v", sizes)
	}
}

func itoa(n int) string {
	return string([]byte{'0' + byte(n/100), '0' + byte(n/10%10), '0' + byte(n%10)})
}
