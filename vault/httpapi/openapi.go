package httpapi

import (
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/vault"
)

const (
	schemaPrefix = "#/components/schemas/"
	bearerScheme = "tenant"
	// APIVersion is the version of the interface, not of the program.
	APIVersion = "1"
)

// The schemas of types whose text form huma does not know.
type (
	bytesSchema      struct{}
	generationSchema struct{}
	uint32Schema     struct{}
	uint64Schema     struct{}
)

func (bytesSchema) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeString, ContentEncoding: "base64url", Pattern: "^[A-Za-z0-9_-]*$"}
}

func (generationSchema) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeString, Pattern: "^[0-9a-f]{32}$"}
}

func (uint32Schema) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeInteger, Minimum: new(float64(0)), Maximum: new(float64(1<<32 - 1))}
}

func (uint64Schema) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeInteger, Minimum: new(float64(0))}
}

func newDocument() *huma.OpenAPI {
	registry := huma.NewMapRegistry(schemaPrefix, huma.DefaultSchemaNamer)
	registry.RegisterTypeAlias(reflect.TypeFor[api.Bytes](), reflect.TypeFor[bytesSchema]())
	registry.RegisterTypeAlias(reflect.TypeFor[api.GenerationID](), reflect.TypeFor[generationSchema]())
	registry.RegisterTypeAlias(reflect.TypeFor[uint32](), reflect.TypeFor[uint32Schema]())
	registry.RegisterTypeAlias(reflect.TypeFor[uint64](), reflect.TypeFor[uint64Schema]())
	return &huma.OpenAPI{
		OpenAPI: "3.1.0",
		Info: &huma.Info{
			Title:   "Backup Key Vault",
			Version: APIVersion,
			Description: "Bodies are JSON in UTF-8: an unknown or repeated member, a null, or anything after the object is refused. " +
				"Bytes travel as base64url without padding, times as RFC 3339 in UTC, durations as whole seconds. " +
				"Every refusal is a problem (RFC 9457) whose type is one of those listed with its status; a path that is not here " +
				"answers " + api.NotFound + ", a method that is not here " + api.MethodNotAllowed + ". " +
				"Every answer carries X-Request-Id.",
		},
		Components: &huma.Components{
			Schemas: registry,
			SecuritySchemes: map[string]*huma.SecurityScheme{
				bearerScheme: {
					Type: "http", Scheme: "bearer", BearerFormat: "JWT",
					Description: "A token that the user's app signs with EdDSA, ES256 or RS256: iss is the tenant, kid its key, aud the vault's id, " +
						"sub the user, exp at most ten minutes ahead.",
				},
			},
		},
	}
}

// document adds an operation to the document, and returns the members that its body must have.
func document[In, Out any](doc *huma.OpenAPI, op operation) []member {
	registry := doc.Components.Schemas
	o := &huma.Operation{
		Method: op.method, Path: op.path, OperationID: op.id,
		Summary: op.summary, Description: op.doc,
		Security: []map[string][]string{},
		Responses: map[string]*huma.Response{
			strconv.Itoa(http.StatusOK): {
				Description: "Done",
				Headers:     map[string]*huma.Param{"X-Request-Id": requestIDHeader},
				Content: map[string]*huma.MediaType{
					"application/json": {Schema: registry.Schema(reflect.TypeFor[Out](), true, op.id+"Response")},
				},
			},
		},
	}
	if !op.public {
		o.Security = []map[string][]string{{bearerScheme: {}}}
		o.Parameters = append(o.Parameters, &huma.Param{
			Name: "user", In: "path", Required: true,
			Description: fmt.Sprintf("The user id, the token's sub, percent-encoded: at most %d bytes of UTF-8, byte-exact.", vault.MaxUserBytes),
			Schema:      &huma.Schema{Type: huma.TypeString, MinLength: new(1), MaxLength: new(vault.MaxUserBytes)},
		})
	}
	for _, p := range op.query {
		o.Parameters = append(o.Parameters, &huma.Param{
			Name: p.name, In: "query", Required: p.required, Description: p.doc,
			Schema: registry.Schema(reflect.TypeOf(p.schema), true, ""),
		})
	}
	var required []member
	hasBody := reflect.TypeFor[In]() != reflect.TypeFor[none]()
	if hasBody {
		schema := registry.Schema(reflect.TypeFor[In](), true, op.id+"Request")
		o.RequestBody = &huma.RequestBody{
			Required: true, Content: map[string]*huma.MediaType{"application/json": {Schema: schema}},
		}
		required = requiredMembers(registry, schema, "")
	}
	for status, kinds := range kindsByStatus(problemsOf(op, hasBody)) {
		o.Responses[strconv.Itoa(status)] = problemResponse(registry, kinds)
	}
	doc.AddOperation(o)
	return required
}

var requestIDHeader = &huma.Param{
	Description: "The request's id: the client's own, if it sent one of 1 to 64 letters, digits, dots, dashes and underscores.",
	Schema:      &huma.Schema{Type: huma.TypeString},
}

// problemsOf lists what an operation can answer: its own, and what all of its kind can.
func problemsOf(op operation, hasBody bool) []string {
	kinds := append(slices.Clone(op.problems), api.InvalidRequest, api.Internal, api.TokenUnavailable, api.StoreUnavailable, api.Busy)
	if !op.public {
		kinds = append(kinds, api.Unauthenticated, api.Forbidden, api.RateLimited, api.AccountFault)
	}
	if hasBody {
		kinds = append(kinds, api.TooLarge, api.MediaType)
	}
	if op.registration {
		kinds = append(kinds, api.RelayRequired)
	}
	slices.Sort(kinds)
	return slices.Compact(kinds)
}

func problemResponse(registry huma.Registry, kinds []string) *huma.Response {
	types := make([]any, len(kinds))
	names := make([]string, len(kinds))
	headers := map[string]*huma.Param{"X-Request-Id": requestIDHeader}
	for i, k := range kinds {
		types[i], names[i] = k, strings.TrimPrefix(k, api.ProblemPrefix)
		switch k {
		case api.TooEarly, api.RateLimited, api.TokenUnavailable, api.StoreUnavailable, api.Busy:
			headers["Retry-After"] = &huma.Param{
				Description: "Seconds.", Schema: &huma.Schema{Type: huma.TypeInteger, Minimum: new(float64(1))},
			}
		case api.Unauthenticated:
			headers["WWW-Authenticate"] = &huma.Param{Schema: &huma.Schema{Type: huma.TypeString}}
		}
	}
	return &huma.Response{
		Description: strings.Join(names, ", "),
		Headers:     headers,
		Content: map[string]*huma.MediaType{
			api.ProblemMediaType: {Schema: &huma.Schema{AllOf: []*huma.Schema{
				registry.Schema(reflect.TypeFor[api.Problem](), true, ""),
				{Type: huma.TypeObject, Properties: map[string]*huma.Schema{"type": {Type: huma.TypeString, Enum: types}}},
			}}},
		},
	}
}

// documentRaw adds an operation whose bodies are not JSON; of in "" says that it takes none.
func documentRaw(doc *huma.OpenAPI, op operation, in, out string) {
	binary := func(mediaType string) map[string]*huma.MediaType {
		return map[string]*huma.MediaType{mediaType: {Schema: &huma.Schema{Type: huma.TypeString, ContentEncoding: "binary"}}}
	}
	o := &huma.Operation{
		Method: op.method, Path: op.path, OperationID: op.id, Summary: op.summary, Description: op.doc,
		Security: []map[string][]string{},
		Responses: map[string]*huma.Response{
			strconv.Itoa(http.StatusOK): {
				Description: "Done", Headers: map[string]*huma.Param{"X-Request-Id": requestIDHeader}, Content: binary(out),
			},
		},
	}
	if !op.public {
		o.Security = []map[string][]string{{bearerScheme: {}}}
	}
	if in != "" {
		o.RequestBody = &huma.RequestBody{Required: true, Content: binary(in)}
	}
	kinds := append(slices.Clone(op.problems), api.InvalidRequest, api.Internal, api.TokenUnavailable, api.StoreUnavailable)
	if !op.public {
		kinds = append(kinds, api.Unauthenticated, api.RateLimited)
	}
	for status, kinds := range kindsByStatus(kinds) {
		o.Responses[strconv.Itoa(status)] = problemResponse(doc.Components.Schemas, kinds)
	}
	doc.AddOperation(o)
}

// requiredMembers lists what a body must have, parents before their members: what the
// document says is what decode demands.
func requiredMembers(registry huma.Registry, s *huma.Schema, at string) []member {
	if s.Ref != "" {
		s = registry.SchemaFromRef(s.Ref)
	}
	var out []member
	for _, name := range s.Required {
		out = append(out, member{parent: at, pointer: at + "/" + name})
	}
	for name, p := range s.Properties {
		out = append(out, requiredMembers(registry, p, at+"/"+name)...)
	}
	return out
}

// finishSchemas mends what huma says of types in general and is not so here.
// Arrays are never null. What the vault answers can have more members in a later
// version, and a client must pass over those (a Problem's by RFC 9457 §3.2); what it is sent cannot.
func finishSchemas(doc *huma.OpenAPI) {
	requests := map[string]bool{}
	var mark func(s *huma.Schema)
	mark = func(s *huma.Schema) {
		if name, ok := strings.CutPrefix(s.Ref, schemaPrefix); ok {
			requests[name] = true
			s = doc.Components.Schemas.SchemaFromRef(s.Ref)
		}
		for _, p := range s.Properties {
			mark(p)
		}
	}
	for _, path := range doc.Paths {
		for _, o := range []*huma.Operation{path.Post, path.Put} {
			if o == nil {
				continue
			}
			if body := o.RequestBody.Content["application/json"]; body != nil {
				mark(body.Schema)
			}
		}
	}
	for name, s := range doc.Components.Schemas.Map() {
		if !requests[name] {
			s.AdditionalProperties = nil
		}
		for _, p := range s.Properties {
			if p.Type == huma.TypeArray {
				p.Nullable = false
			}
		}
	}
}

// serveDocument renders the document and serves it at /openapi.json.
func (s *server) serveDocument() error {
	finishSchemas(s.document)
	body, err := s.document.MarshalJSON()
	if err != nil {
		return fmt.Errorf("rendering the OpenAPI document: %w", err)
	}
	s.router.Get("/openapi.json", func(w http.ResponseWriter, r *http.Request) {
		x := exchangeOf(r.Context())
		x.route = "/openapi.json"
		w.Header().Set("Cache-Control", cacheForAWhile)
		write(w, x, http.StatusOK, "application/json", body)
	})
	return nil
}
