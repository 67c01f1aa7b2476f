// Opens the API's own description; both paths are relative, so that a stage prefix in front of the server does no harm.
window.addEventListener("load", () => {
  window.ui = SwaggerUIBundle({
    url: "api-docs/openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis, SwaggerUIStandalonePreset],
    layout: "StandaloneLayout",
  });
});
